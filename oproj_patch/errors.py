"""Every refusal of the package: one exception type, one stable code each.

`CODES` is the single list; the documentation repeats it and a test compares the two.
"""

from __future__ import annotations

CODES: dict[str, str] = {
    "OPROJ001": "the toggle's value is not understood",
    "OPROJ002": "another variable of the package has a value that is not understood",
    "OPROJ003": "the group size does not fit the data-parallel layout",
    "OPROJ004": "data-parallel ranks do not run in lock step (dense model)",
    "OPROJ005": "an o_proj cannot be divided over the group",
    "OPROJ006": "vLLM could not build the sharded o_proj layer (its own error follows)",
    "OPROJ007": "a layer that must be sharded was not, or a model has no such layer",
    "OPROJ008": "a patched symbol is missing or has changed in this release of the host",
    "OPROJ009": "this release of the host was not tested",
    "OPROJ010": "the toggle was changed while sharded layers exist",
    "OPROJ011": "the ranks of a group do not agree on settings or versions",
    "OPROJ012": "the ranks of a group built different sharded layers",
    "OPROJ013": "the ranks of a group reached different steps, or one did not arrive",
    "OPROJ014": "the row counts of a forward pass are not what the host announced",
    "OPROJ015": "a feature that cannot be combined with a sharded o_proj is configured",
    "OPROJ016": "the host's built-in o_proj sharding is configured as well",
    "OPROJ017": "`auto` was asked for but the host's configuration names no size",
    "OPROJ018": "the command line was given something it cannot use",
}


class OprojError(RuntimeError):
    """A refusal. `code` is a key of `CODES`; the message begins with it."""

    def __init__(self, code: str, sentence: str) -> None:
        if code not in CODES:
            raise KeyError(code)
        self.code, self.sentence = code, sentence
        super().__init__(code, sentence)  # what another process makes the error from

    def __str__(self) -> str:
        return f"{self.code}: {self.sentence}"


class OprojValueError(OprojError, ValueError):
    """A refusal caused by a value the user gave."""
