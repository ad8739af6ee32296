"""Suffixes of the supported files, in lower case, with their dots: for training, commands and the runtime."""

__all__ = ["ALL", "AUDIO", "IMAGES", "VIDEO"]

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
VIDEO = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".3gp", ".ogv", ".gif")
AUDIO = (
    ".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".aif", ".aiff", ".au", ".caf", ".wma", ".w64", ".webm",
    ".mp4", ".mkv", ".mov",
)  # fmt: skip
ALL = tuple(dict.fromkeys((*IMAGES, *AUDIO, *VIDEO)))
