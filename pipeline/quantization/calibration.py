"""Which documents a method that looks at activations looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from pipeline.config.settings.run import Run
from pipeline.data.documents import Dataset, Document
from pipeline.data.files import read_documents
from pipeline.errors import UserError


class Calibrated(Protocol):
    """Settings that say what to look at."""

    @property
    def calibration(self) -> str | None: ...
    @property
    def calibration_documents(self) -> int: ...


def calibration_documents(
    stage: Calibrated, run: Run, data: Dataset, key: str
) -> Sequence[Document]:
    """Return the file's documents, or the first of the train split by content digest.

    Raises:
        UserError: If the file cannot be read, is made for another task, or holds a document of the
            test split.
    """
    if stage.calibration is None:
        # By digest: the same documents whatever the order of the file.
        return sorted(data.splits["train"], key=lambda document: document.digest)[
            : stage.calibration_documents
        ]
    labels = data.labels if run.task.kind.labelled else None
    documents = read_documents(
        Path(stage.calibration).expanduser(), run.data, run.task, labels, key
    )
    documents = [document for document in documents if not document.is_blank]
    if not documents:
        raise UserError(
            key, f"{stage.calibration} holds no text", "give documents like those of the data"
        )
    if (documents[0].messages is None) != (data.splits["train"][0].messages is None):
        kind = "plain text" if documents[0].messages is None else "chats"
        raise UserError(
            key,
            f"{stage.calibration} holds {kind}, unlike the data",
            "calibrate on what it will read",
        )
    tested = {document.digest for document in data.splits["test"]}
    if any(document.digest in tested for document in documents):
        raise UserError(key, "a document of it is in the test split", "calibrate on others")
    return documents[: stage.calibration_documents]
