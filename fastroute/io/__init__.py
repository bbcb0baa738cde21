"""Reading and writing image files: :func:`read_picture` and :func:`write_picture` keep all metadata, :func:`read_image` and
:func:`write_image` handle plain tensors."""

from fastroute.io.count import count_pictures
from fastroute.io.files import SUFFIXES, ImageError, check_writable, list_images, write_atomically
from fastroute.io.picture import Metadata, Origin, Picture
from fastroute.io.read import read_image, read_picture
from fastroute.io.recognise import READ_SUFFIXES, format_of_bytes, format_of_file, is_image
from fastroute.io.write import check_holds, not_kept, write_image, write_picture

__all__ = [
    "READ_SUFFIXES",
    "SUFFIXES",
    "ImageError",
    "Metadata",
    "Origin",
    "Picture",
    "check_holds",
    "check_writable",
    "count_pictures",
    "format_of_bytes",
    "format_of_file",
    "is_image",
    "list_images",
    "not_kept",
    "read_image",
    "read_picture",
    "write_atomically",
    "write_image",
    "write_picture",
]
