"""Which architectures with experts of the newest release are sharded, and which are refused.

`docs/architectures.md` names the test of each. A model of another architecture may be sharded as
well: the check after construction decides, before a weight is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import OprojError
from ..settings import TOGGLE

_SHARDED = """
    AXK1ForCausalLM AfmoeForCausalLM AliceAIForCausalLM AriaForConditionalGeneration
    BailingMoeForCausalLM BailingMoeV25MTPModel BailingMoeV2ForCausalLM BailingMoeV2_5ForCausalLM
    BailingMoeV3ForCausalLM BailingMoeV3MTPModel BailingMoeV3VLForConditionalGeneration
    BeamForCausalLM ClefFlashForJointSchema ClefOmniForJointSchema Cohere2MoeForCausalLM ColQwen3_5
    Cosmos3EdgeForConditionalGeneration DFlashLagunaForCausalLM DSparkDraftModel DSparkV41DraftModel
    DeepSeekMTPModel DeepSeekV4MTPModel DeepseekForCausalLM DeepseekV2ForCausalLM
    DeepseekV32ForCausalLM DeepseekV32MTPModel DeepseekV3BidirectionalModel DeepseekV3ForCausalLM
    DeepseekV41ForCausalLM DeepseekV4ForCausalLM DeepseekV4ForConditionalGeneration
    DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM Dots3NoteMTPModel
    Eagle3DeepseekV2ForCausalLM Eagle3DeepseekV3ForCausalLM EagleDeepSeekMTPModel
    EagleLlama4ForCausalLM EagleMiniCPMForCausalLM EagleMistralLarge3ForCausalLM
    Ernie4_5_MoeForCausalLM Ernie4_5_VLMoeForConditionalGeneration Exaone4_5_MTP
    ExaoneMoEForCausalLM ExaoneMoeForCausalLM ExaoneMoeMTP FlexOlmoForCausalLM FlintForCausalLM
    Gemma4ForCausalLM Gemma4ForConditionalGeneration Gemma4UnifiedForConditionalGeneration
    Glm4MoeForCausalLM Glm4MoeLiteForCausalLM Glm4MoeLiteMTPModel Glm4MoeMTPModel
    Glm5NextForCausalLM Glm5NextForConditionalGeneration Glm5NextMTPModel GlmMoeDsaForCausalLM
    GlmOcrMTPModel GptOssForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
    GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM HYV3ForCausalLM HYV3MTPModel
    HYV4ForCausalLM HYV4MTPModel HfMoondream HunYuanMoEV1ForCausalLM InklingForCausalLM
    InklingForConditionalGeneration InklingMTPModel InternS1ProForConditionalGeneration
    InternS2MobiusForConditionalGeneration InternS2MobiusMTP InternS2PreviewForConditionalGeneration
    JambaForCausalLM JambaForSequenceClassification K2HorizonForCausalLM
    KimiK25ForConditionalGeneration KimiK3ForConditionalGeneration KimiK3MTPModel
    KimiLinearForCausalLM KimiVLForConditionalGeneration Kolibri1ForCausalLM LagunaForCausalLM
    Lfm2MoeForCausalLM Llama4ForCausalLM Llama4ForConditionalGeneration LongCatFlashMTPModel
    LongcatFlashForCausalLM LongcatFlashNgramForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM
    MiMoV2ForCausalLM MiMoV2OmniForCausalLM MiniCPM3ForCausalLM MiniCPMForCausalLM
    MiniCPMOcrForConditionalGeneration MiniCPMV MiniCPMV4_6ForConditionalGeneration
    MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM MiniMaxM3MTP MiniMaxM3SparseForCausalLM
    MiniMaxM3SparseForConditionalGeneration MistralLarge3ForCausalLM MixtralForCausalLM
    Moondream3ForCausalLM MuseSparkDSparkModel MuseSparkForConditionalGeneration
    NemotronHForCausalLM NemotronHMTPModel NemotronHPuzzleForCausalLM
    NemotronH_Nano_Omni_Reasoning_V3 NemotronH_Nano_VL_V2 NemotronH_Omni_Reasoning_V3
    NemotronH_Super_Omni_Reasoning_V3 OlmoeForCausalLM OpenPanguMTPModel
    OpenPanguVLForConditionalGeneration PanguEmbeddedForCausalLM PanguProMoEV2ForCausalLM
    PanguUltraMoEForCausalLM Param2MoEForCausalLM PhiMoEForCausalLM Qwen2MoeForCausalLM
    Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3NextMTP Qwen3OmniMoeForConditionalGeneration
    Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MTP
    Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration Qwen3_5MoeMTP Qwen4ExpForCausalLM
    Qwen4ExpForConditionalGeneration Qwen4ExpMTP SarvamMLAForCausalLM SarvamMoEForCausalLM
    Step3TextForCausalLM Step3p5ForCausalLM Step3p5MTP Step5ForCausalLM Step5MTP
    TransformersMoEEmbeddingModel TransformersMoEForCausalLM TransformersMoEForMTP
    TransformersMoEForSequenceClassification TransformersMultiModalMoEForCausalLM
"""
SHARDED = frozenset(_SHARDED.split())
NO_CACHE = frozenset({"EmbeddingGemma2Model", "OpenAIPrivacyFilterForTokenClassification"})


def told(names: Sequence[str]) -> tuple[bool, str]:
    """Return whether a model with these architectures is in the table, and what is known of it.

    Raises OprojError when its attention cannot be sharded.
    """
    known = [name for name in names if name in SHARDED | NO_CACHE]
    if not known:
        what = "it starts only if an o_proj is found in each of its softmax attentions"
        return False, f"{', '.join(names)} is not in docs/architectures.md: {what}."
    if known[0] in NO_CACHE:
        raise OprojError(
            "OPROJ007",
            f"{TOGGLE} is set, but the attention of {known[0]} has no KV cache; accepted are "
            "models with a softmax attention and its cache: unset the variable for this model.",
        )
    return True, f"{known[0]}: the o_proj of every softmax attention is sharded."
