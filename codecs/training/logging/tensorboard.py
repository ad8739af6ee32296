"""The TensorBoard logger."""

import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from varitok import UserError
from varitok.data.decoding.audio import AudioFile
from varitok.data.decoding.images import open_image
from varitok.data.decoding.video import VideoFile
from varitok.data.storage.members import InMemory

from .loggers import RunLog, unharmed
from .scalars import Appended, replace, stays

__all__ = ["TensorboardLog"]


class TensorboardLog(RunLog):
    """A logger of scalars, images, audio, and video as GIFs to one event file in the run's `tensorboard/`.

    A resumed run continues the file (TensorBoard's own writer starts another, and keeps repeated events).
    `tensorboard --logdir runs` shows it.

    Raises:
        UserError: The package `tensorboard` isn't installed.
    """

    def __init__(self, folder: str, name: str) -> None:
        super().__init__(folder, name)
        try:
            from tensorboard.backend.event_processing.event_file_loader import (  # noqa: PLC0415 (an extra)
                LegacyEventFileLoader,
            )
            from tensorboard.compat.proto import event_pb2, summary_pb2  # noqa: PLC0415
            from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise UserError(
                f"logger=tensorboard: needs the package {error.name}; pip install 'varitok[tensorboard]'"
            ) from error
        self.events, self.summaries = event_pb2, summary_pb2
        self.writer, self.reader = RecordWriter, LegacyEventFileLoader
        # TensorBoard recognizes event files by "tfevents" in their names.
        self.file = Appended(self.folder / "tensorboard" / "events.out.tfevents.0.varitok")
        self.file.head = self._record(self.events.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _record(self, event: Any) -> bytes:
        """Serialize an event as a TFRecord."""
        framed = io.BytesIO()
        self.writer(framed).write(event.SerializeToString())
        return framed.getvalue()

    def _add(self, update: int, values: list[Any]) -> None:
        self.file.path.parent.mkdir(exist_ok=True)
        summary = self.summaries.Summary(value=values)
        self.file.append(self._record(self.events.Event(wall_time=time.time(), step=update, summary=summary)))

    @unharmed
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars."""
        value = self.summaries.Summary.Value
        self._add(step or 0, [value(tag=name, simple_value=number) for name, number in metrics.items()])

    @unharmed
    def rewind(self, update: int, total: int) -> None:
        """Remove an incomplete event, and the events of updates that are repeated."""
        if not self.file.path.exists():
            return
        kept = [self.file.head]
        for event in self.reader(str(self.file.path)).Load():  # complete ones only
            values = [value for value in event.summary.value if stays(event.step, value.tag, update, total)]
            if values:
                kept.append(self._record(self.events.Event(
                    wall_time=event.wall_time, step=event.step, summary=self.summaries.Summary(value=values)
                )))  # fmt: skip
        replace(self.file.path, b"".join(kept))

    @unharmed
    def log_picture(self, name: str, picture: Path, update: int) -> None:
        """Log an image file."""
        self._add(update, [self._image(name, picture.read_bytes())])

    @unharmed
    def log_media(self, name: str, files: Mapping[str, Path], update: int) -> None:
        """Log audio and video files."""
        if files:
            self._add(update, [self._medium(f"{name}/{label}", path) for label, path in files.items()])

    def _medium(self, tag: str, path: Path) -> Any:
        return self._sound(tag, path) if path.suffix == ".wav" else self._image(tag, _encode_gif(path))

    def _image(self, tag: str, data: bytes) -> Any:
        with open_image(InMemory(tag, data)) as opened:
            width, height = opened.size
        image = self.summaries.Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        return self.summaries.Summary.Value(tag=tag, image=image)

    def _sound(self, tag: str, path: Path) -> Any:
        with AudioFile(path) as sound:
            audio = self.summaries.Summary.Audio(
                sample_rate=sound.sample_rate,
                num_channels=sound.channels,
                length_frames=sound.length,
                encoded_audio_string=path.read_bytes(),
                content_type="audio/wav",
            )
        return self.summaries.Summary.Value(tag=tag, audio=audio)


def _encode_gif(path: Path) -> bytes:
    """Encode a video file as an animated GIF, which TensorBoard shows as an image."""
    with VideoFile(path) as clip:
        first, *others = [Image.fromarray(frame) for frame in clip.read()]
        duration = 1000 / clip.frame_rate
    animated = io.BytesIO()
    first.save(animated, "gif", save_all=True, append_images=others, duration=duration, loop=0)
    return animated.getvalue()
