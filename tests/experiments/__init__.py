from __future__ import annotations

from typing import Any

import torch

import miner_lens as ml


def naive_logprob(model: Any, sample: ml.Sample) -> float:
    """The log-probability of a sample's answer, token by token, each after a pass of its own."""
    tokenizer = model.processor.tokenizer
    inputs = {
        ("input_ids" if k == "input" else k): v
        for k, v in ml.inputs(model, sample.messages).items()
    }
    total = 0.0
    for token in tokenizer(sample.answers[0], add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            logits = model.original_model(**inputs, use_cache=False).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        one = torch.tensor([[token]])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], one], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(one)], 1)
        if "mm_token_type_ids" in inputs:
            types = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(one)], 1)
    return total
