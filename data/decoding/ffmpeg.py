"""Open media files with FFmpeg, through PyAV, which a runtime without video may lack."""

from typing import Any

from ..storage.members import Source, open_file
from .errors import BadSample

__all__ = ["PATIENCE", "import_av", "open_media"]

# FFmpeg also opens playlists, which name other files and URLs: only containers are allowed.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,h264,hevc,ogg,gif,flv,asf,"
    "aac,mp3,flac,wav,w64,aiff,ac3,eac3,amr,caf"
)
PATIENCE = 60.0  # seconds that a read may take; a damaged file can keep a decoder busy forever


def import_av(file: Source) -> Any:
    """Return the module `av`, which `file` needs.

    Raises:
        BadSample: It isn't installed.
    """
    try:
        import av  # noqa: PLC0415 (an extra)
    except ImportError:
        raise BadSample(str(file), "needs the package av; pip install 'varitok[video]'") from None
    return av


def open_media(file: Source) -> Any:
    """Open a file for decoding.

    Returns:
        PyAV's input container.

    Raises:
        BadSample: PyAV isn't installed.
        av.error.FFmpegError: The file can't be read.
    """
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    return import_av(file).open(open_file(file), options=options, timeout=PATIENCE)
