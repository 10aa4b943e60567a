"""A start with some parameters frozen."""

from dataclasses import dataclass

from kd_core.errors import UsageError
from kd_core.students.decoder.architecture import Architecture
from kd_core.students.starts.name_patterns import match_names
from kd_core.students.starts.start import StudentInit
from kd_core.students.student import Student


@dataclass(frozen=True)
class FrozenStart:
    """The start `base`, without training of parameters whose names match `patterns`.

    Examples of patterns: `embed_tokens.weight`, `layers.[0-3].*`.
    """

    base: StudentInit
    patterns: tuple[str, ...]

    @property
    def folder(self) -> str:
        return self.base.folder

    def architecture(self) -> Architecture:
        return self.base.architecture()

    def build_on_meta(self) -> Student:
        """Returns the decoder of the base, with `requires_grad` off where a pattern matches.

        Raises:
            UsageError: a pattern matches nothing, or nothing is left to train.
        """
        model = self.base.build_on_meta()
        named = dict(model.named_parameters(remove_duplicate=False))  # a tied lm_head under both names
        for name in match_names(named, self.patterns, "student.patterns"):
            named[name].requires_grad_(False)
        if not any(parameter.requires_grad for parameter in named.values()):
            raise UsageError(f"student.patterns: {self.patterns} match every parameter, so nothing is left to train.")
        return model

    def fill(self, model: Student, seed: int) -> None:
        self.base.fill(model, seed)
