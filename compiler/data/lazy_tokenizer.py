"""A tokenizer whose files stay in memory: they are read with their build, and parsed when they are first used."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from trimtab.compiler.data.tokenizer import Tokenizer, load_tokenizer
from trimtab.passes.errors import ModelError
from trimtab.passes.temporary import temporary_folder


class LazyTokenizer:
    """The files of a tokenizer, parsed on demand. Any number of threads may share it.

    Args:
        folder: folder that the files were read from, for messages.
        files: name → content.
        max_tokens: the longest text that the model takes.
    """

    def __init__(self, folder: Path, files: Mapping[str, bytes], max_tokens: int | None) -> None:
        self._folder, self._files, self._max_tokens = folder, dict(files), max_tokens
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None

    def get(self) -> Tokenizer:
        """The tokenizer; the first call parses the files.

        Raises:
            ModelError: the files are no tokenizer that can be read.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._parse()
                self._files.clear()
            return self._tokenizer

    def _parse(self) -> Tokenizer:
        with temporary_folder("tokenizer") as scratch:
            for name, content in self._files.items():
                (scratch / name).write_bytes(content)
            try:
                return load_tokenizer(scratch, self._max_tokens)
            except ModelError as error:
                message = error.message.replace(str(scratch), str(self._folder))
                raise ModelError(message, hint=error.hint) from error
