"""Results as JSON of a closed schema: written as a whole, read back checked."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from compressor.errors import RunError
from compressor.run_directory import read_json, write_json_atomically

_Record = TypeVar("_Record", bound=BaseModel)


def write_record(record: BaseModel, path: Path) -> None:
    """As a whole or not at all."""
    write_json_atomically(path, record.model_dump(mode="json"))


def read_record(path: Path, record_type: type[_Record], *, kind: str, remedy: str) -> _Record:
    """A record from JSON.

    Args:
        path: of the file.
        record_type: its schema.
        kind: what it should be, such as `report of schema 2`.
        remedy: what to do if it is not.

    Raises:
        RunError: if it is missing, damaged or of another schema.
    """
    try:
        return record_type.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        said = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ArithmeticError as error:  # counts for which no interval can be computed
        said = str(error)
    raise RunError(f"{path} is not a {kind}: {said}; {remedy}")
