"""Image files in and out: :func:`read_picture` and :func:`write_picture` keep all that a file says, :func:`read_image` and
:func:`write_image` are plain tensors."""

from fastroute.io.files import SUFFIXES, ImageError, check_writable, list_images, write_atomically
from fastroute.io.picture import Metadata, Picture
from fastroute.io.read import read_image, read_picture
from fastroute.io.write import check_holds, write_image, write_picture

__all__ = [
    "SUFFIXES",
    "ImageError",
    "Metadata",
    "Picture",
    "check_holds",
    "check_writable",
    "list_images",
    "read_image",
    "read_picture",
    "write_atomically",
    "write_image",
    "write_picture",
]
