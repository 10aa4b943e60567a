"""A start that makes a student of any causal language model of transformers (extra `hf`)."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from kd_core.errors import UsageError
from kd_core.hub import resolve_folder
from kd_core.ranges import AT_LEAST_1, check_settings
from kd_core.sharded_values import errors_on_all_ranks
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.student import Student

Attention = Literal["auto", "eager", "sdpa", "flex_attention", "flash_attention_2"]


@dataclass(frozen=True)
class Transformers:
    """A student from a Hugging Face folder of any family, through transformers' own model.

    Of a vision-language model it is the language model. Families of our own decoder are faster through `Pretrained`.

    Args:
        folder: the folder, `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION`.
        vocab_size: the real vocabulary, if it differs from the tokenizer's. Rows of the weights beyond it are padding.
        attention: transformers' name of an implementation. auto: what transformers takes for the family.
    """

    folder: str
    vocab_size: int | None = None
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        check_settings(self, "student.", vocab_size=AT_LEAST_1)

    def _config(self) -> Any:
        from kd_core.students.transformers_student.transformers_config import student_config  # noqa: PLC0415 (an extra)

        return student_config(resolve_folder(self.folder), None if self.attention == "auto" else self.attention)

    def architecture(self) -> Architecture:
        """Returns the sizes that the folder's configuration names, with the set vocabulary."""
        from kd_core.students.transformers_student.transformers_student import read_sizes  # noqa: PLC0415 (an extra)

        stored = read_sizes(self._config())
        if self.vocab_size is None:
            return stored
        if self.vocab_size > stored.vocab_size:
            raise UsageError(
                f"student.vocab_size: got {self.vocab_size}; wanted 1 to the {stored.vocab_size} rows of {self.folder}."
            )
        return replace(stored, vocab_size=self.vocab_size, padded_vocab_size=stored.vocab_size)

    def build_on_meta(self) -> Student:
        from kd_core.students.transformers_student.transformers_config import meta_model  # noqa: PLC0415 (an extra)
        from kd_core.students.transformers_student.transformers_student import TransformersStudent  # noqa: PLC0415

        student = TransformersStudent(meta_model(self._config(), resolve_folder(self.folder)), self.folder)
        student.arch = self.architecture()
        return student

    def fill(self, model: Student, seed: int) -> None:
        """Loads the folder, and computes the buffers that are not in it."""
        from kd_core.students.transformers_student.transformers_student import TransformersStudent  # noqa: PLC0415

        del seed  # nothing is random
        assert isinstance(model, TransformersStudent)
        with errors_on_all_ranks(model.parameters()):
            model.load(resolve_folder(self.folder))
