"""The KV-cache bytes that `oproj-patch plan` counts are those of vLLM's own cache specification."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from oproj_patch.cli.plan import BUILTIN_MODELS, load_model, make_plan

MODEL_TYPES = {
    "deepseek-r1": "deepseek_v3",
    "deepseek-v2-lite": "deepseek_v2",
    "kimi-k2": "deepseek_v3",  # as which vLLM reads kimi_k2
    "qwen3-235b-a22b": "qwen3_moe",
    "glm-4.5": "glm4_moe",
}
WITHOUT = {"deepseek-v4-pro", "deepseek-v4-flash", "deepseek-v4.1-flash"}  # compressed caches
CACHE_DTYPES = {"bf16": "bfloat16", "fp8": "fp8"}  # of plan's --kv-dtype, and vLLM's name of it
BLOCK = 16  # tokens


def host_bytes(name: str, tp: int, cache_dtype: str) -> int:
    """Bytes of one token in all layers of a tensor-parallel rank's cache, as vLLM specifies it."""
    # Here, because collecting the tests should not take the seconds of this import.
    from transformers import AutoConfig
    from vllm.config import ModelConfig
    from vllm.transformers_utils import model_arch_config_convertor as convertors
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    fields = {k: v for k, v in BUILTIN_MODELS[name].items() if k != "quantization_config"}
    config = AutoConfig.for_model(MODEL_TYPES[name], **fields)
    convertor = convertors.MODEL_ARCH_CONFIG_CONVERTORS.get(
        config.model_type, convertors.ModelArchConfigConvertorBase
    )
    arch = convertor(config, config).convert()
    # vLLM's function with the fields that it reads, because a whole ModelConfig imports the model.
    heads = ModelConfig.get_num_kv_heads(
        SimpleNamespace(use_mla=arch.is_deepseek_mla, model_arch_config=arch),
        SimpleNamespace(tensor_parallel_size=tp),
    )
    kind = MLAAttentionSpec if arch.is_deepseek_mla else FullAttentionSpec
    spec = kind(
        block_size=BLOCK,
        num_kv_heads=heads,
        head_size=arch.head_size,
        dtype=STR_DTYPE_TO_TORCH_DTYPE[cache_dtype],
    )
    page: int = spec.page_size_bytes
    assert page % BLOCK == 0
    return page // BLOCK * int(arch.total_num_hidden_layers)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kv_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("name", MODEL_TYPES)
def test_plan_counts_the_bytes_of_the_hosts_cache_specification(
    name: str, tp: int, kv_dtype: str
) -> None:
    plan = make_plan(name, load_model(name), dp=8, tp=tp, kv_dtype=kv_dtype)
    assert plan["kv_bytes_per_token"] == host_bytes(name, tp, CACHE_DTYPES[kv_dtype])


def test_every_other_model_has_no_count() -> None:
    assert BUILTIN_MODELS.keys() == MODEL_TYPES.keys() | WITHOUT
    for name in WITHOUT:
        assert make_plan(name, load_model(name), dp=8)["kv_bytes_per_token"] == 0
