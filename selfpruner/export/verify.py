"""Load a checkpoint the way a stranger does and compare it with what was in memory when it was written.

    python verify.py FOLDER REFERENCE [--device cpu] [--installed]

Run as a script in a fresh process; it imports torch and transformers and nothing of selfpruner, so the folder has to stand on
its own (``trust_remote_code=True``). With ``--installed`` no code of the folder is run, but the installed selfpruner's.

REFERENCE is a safetensors file: ``tokens`` (B, S) int64 and the in-memory model's ``logits`` (B, P, V) float32 of the last P
positions, with the metadata ``parameters``, ``dtype`` (in which the logits were computed), ``text`` and ``ids`` (the text's tokens,
JSON). Prints one JSON object: the numbers and ``problems``, empty when the checkpoint is good.

What is compared, all computed in the reference's dtype
- Logits: in float32 the largest absolute difference may be 1e-3. In the 16-bit types rounding grows with the numbers, so it may
  be 2e-2 of the largest absolute logit. Loading wrong tensors costs far more than either.
- The last tokens fed one by one through the KV cache against all at once: five times that bound, because other shapes take other
  kernels and round otherwise (measured in bfloat16 at 30 layers: 1.5e-2 of the largest logit). A wrong cache costs far more.
- ``generate`` with the cache against without, greedily: equal tokens. Where they part, both tokens must tie within this bound.
- Parameters, tied ones once; no missing, unexpected or mismatched tensor; the tokenizer's ids for the text.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

CACHED = 8  # tokens fed one by one
CACHE_SLACK = 5
PROMPT, GENERATED = 8, 12


def tolerance(dtype: torch.dtype, scale: float) -> float:
    """The largest acceptable absolute difference of two logits; ``scale`` is the largest absolute logit."""
    return 1e-3 if dtype == torch.float32 else 2e-2 * max(1.0, scale)


@torch.inference_mode()
def verify(folder: str, reference: str, device: str, *, own_code: bool = True) -> dict[str, Any]:
    if not own_code:
        import selfpruner.export  # noqa: F401 - registers its classes
    started = time.perf_counter()
    with safe_open(reference, "pt") as file:
        tokens, expected, facts = file.get_tensor("tokens").to(device), file.get_tensor("logits"), file.metadata()
    # Told to go on, so that the report names tensors of another shape.
    how = {"trust_remote_code": own_code, "output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, facts["dtype"]), **how)
    model, report = loaded
    model = model.to(device).eval()
    problems = [f"{kind}: {', '.join(sorted(map(str, names))[:3])}" for kind, names in report.items() if names]

    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != int(facts["parameters"]):
        problems.append(f"{parameters:,} parameters instead of {int(facts['parameters']):,}")

    logits = model(tokens, use_cache=False).logits
    scale = float(expected.abs().max())
    bound = tolerance(model.dtype, scale)
    difference = float((logits[:, -expected.shape[1] :].float().cpu() - expected).abs().max())
    if not difference <= bound:  # also when it is NaN
        problems.append(f"logits differ by {difference:.3g}, allowed {bound:.3g}")

    cached = model(tokens[:, :-CACHED], use_cache=True)
    rows = []
    for position in range(tokens.shape[1] - CACHED, tokens.shape[1]):
        cached = model(tokens[:, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
        rows.append(cached.logits)
    cache_difference = float((torch.cat(rows, 1).float() - logits[:, -CACHED:].float()).abs().max())
    if not cache_difference <= CACHE_SLACK * bound:
        problems.append(f"logits through the KV cache differ by {cache_difference:.3g}, allowed {CACHE_SLACK * bound:.3g}")

    greedy = _greedy(model, tokens[:1, :PROMPT], CACHE_SLACK * bound)
    if greedy == "different":
        problems.append("greedy generation with the KV cache differs from generation without")

    # Told neither way it asks on the terminal, because the config it reads first has code of its own.
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)(facts["text"])["input_ids"]
    if ids != json.loads(facts["ids"]):
        problems.append("the tokenizer gives other tokens than the one in memory")

    return {
        "problems": problems,
        "class": type(model).__name__,
        "code": type(model).__module__.split(".")[0],  # "transformers_modules" is the folder's own
        "device": device,
        "dtype": facts["dtype"],
        "tokens": tokens.numel(),
        "parameters": parameters,
        "max_difference": difference,
        "cache_difference": cache_difference,
        "allowed_difference": bound,
        "max_logit": scale,
        "greedy": greedy,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_mib": _peak_mib(),
    }


def _greedy(model: Any, prompt: torch.Tensor, bound: float) -> str:
    """``equal``, ``tied`` (they part at two tokens of equal logit, up to ``bound``) or ``different``."""
    how = {"max_new_tokens": GENERATED, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    mask = torch.ones_like(prompt)
    one, two = (model.generate(prompt, attention_mask=mask, use_cache=use, **how)[0].tolist() for use in (True, False))
    if one == two:
        return "equal"
    parting = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    last = model(torch.tensor([two[:parting]], device=prompt.device), use_cache=False).logits[0, -1].float()
    return "tied" if float((last[one[parting]] - last[two[parting]]).abs()) <= bound else "different"


def _peak_mib() -> int:
    """Largest resident size so far. Linux carries getrusage's figure over from the parent process, so /proc goes first."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) // 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 * 1024 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--installed", action="store_true")
    options = parser.parse_args()
    try:
        result = verify(options.folder, options.reference, options.device, own_code=not options.installed)
    except torch.OutOfMemoryError as error:
        result = {"problems": [str(error)], "out_of_memory": True}
    except Exception as error:  # whatever stops a stranger from using the folder is the finding
        result = {"problems": [f"{type(error).__name__}: {error}"]}
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
