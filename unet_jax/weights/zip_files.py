"""The zip archives of torch.save and Keras, which store their entries as they are."""

import pathlib
import zipfile

from unet_jax.errors import UserError

OVERSIZED = "it is compressed or declares more data than it holds, which files of torch.save and Keras never do"


def open_zip(file: pathlib.Path) -> zipfile.ZipFile:
    """Opens an archive; a `UserError` if its entries would take more memory than the file is large."""
    archive = zipfile.ZipFile(file)
    entries = archive.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise UserError(f"{file} is refused: {OVERSIZED}. Save the model again")
    return archive
