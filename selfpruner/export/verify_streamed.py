"""Compare a checkpoint with what was computed when it was written, streaming its layers instead of holding it.

    python -m selfpruner.export.verify_streamed FOLDER REFERENCE --device cpu --memory BYTES

REFERENCE and the printed JSON are those of :mod:`selfpruner.export.verify`, whose process loads the model whole. Here the
checkpoint's own modules run over the written files, one layer at a time, for one pass in float32, as the engine does for a model
that it streams; logits may differ by a thousandth of the largest. Parameters and the tokenizer's ids are compared as well. The
cache and generation, which would read the files once per token, are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

from selfpruner.export.modeling_files import MODELING_FILES
from selfpruner.models.checks import read_header, weight_files
from selfpruner.models.memory import peak_mib
from selfpruner.models.streaming import stream


@torch.inference_mode()
def verify(folder: Path, reference: str, device: str, memory: int) -> dict[str, object]:
    """The findings; ``problems`` is empty when the checkpoint is good."""
    started = time.perf_counter()
    with safe_open(reference, "pt") as file:
        tokens, expected, facts = file.get_tensor("tokens").to(device), file.get_tensor("logits"), file.metadata()
    auto = transformers
    config = auto.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    paths = weight_files(folder)
    stored = {name for path in paths for name in read_header(path)}
    with torch.inference_mode(False):
        model: PreTrainedModel = stream(config, paths, torch.device(device), getattr(torch, facts["dtype"]), memory)
    wanted = set(model.state_dict()) - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    problems = [f"unexpected: {name}" for name in sorted(stored - wanted)[:3]]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != int(facts["parameters"]):
        problems.append(f"{parameters:,} parameters instead of {int(facts['parameters']):,}")
    logits = model(tokens, use_cache=False).logits.float().cpu()
    scale = float(expected.abs().max())
    bound = 1e-3 * max(1.0, scale)
    difference = float((logits[:, -expected.shape[1] :] - expected).abs().max())
    if not difference <= bound:  # also when it is NaN
        problems.append(f"logits differ by {difference:.3g}, allowed {bound:.3g}")
    ids = auto.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)(facts["text"])["input_ids"]
    if ids != json.loads(facts["ids"]):
        problems.append("the tokenizer gives other tokens than the one in memory")
    return {
        "problems": problems,
        "class": type(model).__name__,
        "code": type(model).__module__ if type(model) in {form.causal_lm for form in MODELING_FILES.values()} else "transformers",
        "device": device,
        "dtype": facts["dtype"],
        "streamed": True,
        "tokens": tokens.numel(),
        "parameters": parameters,
        "max_difference": difference,
        "allowed_difference": bound,
        "max_logit": scale,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_mib": round(peak_mib()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, required=True)
    options = parser.parse_args()
    try:
        result = verify(options.folder, options.reference, options.device, options.memory)
    except Exception as error:  # anything that stops the folder from being used is a finding
        result = {"problems": [f"{type(error).__name__}: {error}"]}
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
