"""vLLM's LoRA layers around a sharded o_proj.

The owner of a row has all of its input columns, so it adds `x A B` to the row's result by itself:
an adapter needs no exchange. vLLM chooses a LoRA layer by the exact class of its base layer, and
the LoRA layer calls the base layer's quantization method. So vLLM gets a view of the sharded layer:
it has the host's own class, and its quantization method runs a whole step.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..sharding import layer as sharded
from .seam import Seam

# Modules of vLLM's manager of adapters, which import the function by name, and their releases.
MANAGERS = {"vllm.lora.models": ("", "0.12.0"), "vllm.lora.model_manager": ("0.13.0", "")}


def seams() -> tuple[Seam, ...]:
    """Return the seams for `--enable-lora`."""
    why = "give LoRA layers a sharded o_proj in the form that they know"
    return tuple(
        Seam(module, "from_layer", layer_wrapped, why, ("layer",), since, until)
        for module, (since, until) in MANAGERS.items()
    )


def layer_wrapped(wrapped: Any, _: Any, args: Any, kwargs: Any) -> Any:
    """Wrap vLLM's choice of a LoRA layer: in place of a sharded layer it gets the layer's view."""
    given = inspect.signature(wrapped).bind(*args, **kwargs)
    layer = given.arguments["layer"]
    if not isinstance(layer, sharded.ShardedMixin):
        return wrapped(*args, **kwargs)
    given.arguments["layer"] = seen = view(layer)
    made = wrapped(*given.args, **given.kwargs)
    if made is seen:  # vLLM has no LoRA layer for this class
        return layer
    # The tree of modules gets the layer itself, because a reload of weights looks for it there.
    made._modules["base_layer"] = layer
    vars(made)["base_layer"] = seen
    return made


class Step:
    """A quantization method that runs a step of a sharded layer."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def apply(self, _: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Run a step, x [..., K] -> [..., hidden]; it adds the layer's own bias once."""
        return sharded.step(self.layer, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer.quant_method, name)


def view(layer: Any) -> Any:
    """Return a layer of the host's class, with the tensors of `layer` and a `Step`.

    It has the columns of this tensor-parallel rank, because vLLM cuts an adapter by them. It hides
    a bias that a step adds, because up to 0.11 vLLM's LoRA layer would add it again.
    """
    mro = type(layer).__mro__
    cls = next(base for base in mro if not issubclass(base, sharded.ShardedMixin))
    shard, made = layer.oproj, cls.__new__(cls)
    vars(made).update(vars(layer))
    vars(made).update(
        tp_size=shard.group.tp_size, tp_rank=shard.group.tp_rank, quant_method=Step(layer),
        input_size_per_partition=layer.input_size_per_partition * shard.grid.inputs,
    )  # fmt: skip
    if not layer.skip_bias_add:
        vars(made)["bias"] = None
    return made
