"""The zip file of a checkpoint, checked before torch reads it.

torch imports nothing that a checkpoint names, but it takes all the memory that a checkpoint asks
for: a compressed member can be a thousand times larger than its file, and a pickle may call
``bytearray(10**12)``. The checkpoints of this program are not compressed and call few functions.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from typing import IO

MOST_PICKLE_BYTES = 2**24  # structure and names; the numbers of tensors are in other members
_KINDS = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in _KINDS),
}
# Other ways in which a pickle names or calls something. torch.save does not use them.
REFUSED = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}


def check(file: IO[bytes]) -> None:
    """Check that reading a checkpoint takes about as much memory as its file has bytes.

    Args:
        file: the file of a checkpoint, which may have other bytes behind the zip file. It is
            returned to its start.

    Raises:
        ValueError: the zip file is compressed, its members overlap, or its pickle calls other
            functions than those that make tensors.
        zipfile.BadZipFile: the file is not a zip file.
    """
    size = file.seek(0, os.SEEK_END)
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    if any(x.compress_type != zipfile.ZIP_STORED for x in members):
        raise ValueError("a member is compressed")
    if sum(x.file_size for x in members) > size:
        raise ValueError("the members have more bytes than the file")
    # torch finds members without regard to upper and lower case.
    pickles = [x for x in members if x.filename.lower().endswith(".pkl")]
    if len(pickles) != 1 or pickles[0].file_size > MOST_PICKLE_BYTES:
        raise ValueError("there is not one pickle of the usual size")
    _check_pickle(archive.read(pickles[0]))
    file.seek(0)


def _check_pickle(content: bytes) -> None:
    """Raise a ValueError if a pickle names a function or class that is not in ALLOWED."""
    for operation, argument, _ in pickletools.genops(content):
        named = operation.name == "GLOBAL" and argument not in ALLOWED
        if named or operation.name in REFUSED:
            raise ValueError(f"the pickle names {argument}")
