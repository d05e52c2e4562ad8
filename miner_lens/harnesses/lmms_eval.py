"""lmms-eval: each of its models, ablated, under its own name and `-ablated`.

python -m lmms_eval --model qwen2_vl-ablated \
    --model_args pretrained=folder,neurons=image.safetensors,at=image --tasks mme
"""

from typing import Any

from miner_lens.harnesses.ablated import ablated

METHODS = ("loglikelihood", "generate_until", "generate_until_multi_round")


def manifests() -> list[Any]:
    """What lmms-eval finds through its entry points `lmms_eval.models`."""
    from lmms_eval.models import AVAILABLE_CHAT_TEMPLATE_MODELS, AVAILABLE_SIMPLE_MODELS
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(f"{name}-ablated", **{f"{kind}_class_path": f"{__name__}.{kind}_{name}"})
        for kind, names in (
            ("simple", AVAILABLE_SIMPLE_MODELS),
            ("chat", AVAILABLE_CHAT_TEMPLATE_MODELS),
        )
        for name in names
    ]


def __getattr__(name: str) -> type:
    kind, _, model = name.partition("_")
    if kind not in ("simple", "chat"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.models import get_model

    return ablated(get_model(model, force_simple=kind == "simple"), METHODS)
