"""Load a checkpoint the way a stranger does and compare it with what was in memory when it was written.

    python verify.py FOLDER REFERENCE [--device cpu] [--installed]

Run as a script in a fresh process; it imports torch and transformers and nothing of selfpruner, so the folder has to stand on
its own (``trust_remote_code=True``). With ``--installed`` no code of the folder is run, but the installed selfpruner's.

REFERENCE is a safetensors file: ``tokens`` (B, S) int64 and the in-memory model's ``logits`` (B, P, V) of the last P positions,
computed in float32, with the metadata ``parameters``, ``dtype`` (float32), ``text`` and ``ids`` (the text's tokens, JSON). Prints
one JSON object: the numbers and ``problems``, empty when the checkpoint is good.

What is compared, computed in float32 from the weights as they are stored (see :func:`exact`): in 16 bits single tokens come out
otherwise on another kind of processor or in another batch (measured in bfloat16: by 10 to 23 in logits of at most 34, at a token
with hidden states eight times as large as the others'), which would hide or feign a fault.
- Logits: the largest absolute difference may be TOLERANCE of the largest logit. Loading wrong tensors costs far more.
- The last tokens fed one by one through the KV cache against all at once: five times that bound, because other shapes take other
  kernels and round otherwise. A wrong cache costs far more.
- ``generate`` with the cache against without, greedily: equal tokens. Where they part, both tokens must tie within this bound.
- In the dtype that the weights are stored in: finite logits, and at half of the positions no more than ROUNDING away.
- Parameters, tied ones once; no missing, unexpected or mismatched tensor; the tokenizer's ids for the text.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CACHED = 8  # tokens fed one by one
TOLERANCE, CACHE_SLACK = 2e-4, 5
# The error of a position's 16-bit logits over their standard deviation; of unrelated models it is 1.4.
ROUNDING = 0.5
PROMPT, GENERATED = 8, 12
# A model that takes no more than this in float32 is converted once, and not with each of its some thirty passes.
CONVERTED_BYTES = 1 << 30


@contextmanager
def exact(model: torch.nn.Module, held_bytes: int = 0) -> Iterator[None]:
    """Let ``model`` compute in float32 whatever its weights are stored in: a module's are converted while it runs, so that no more
    than one module's are in memory twice; all at once where they take no more than ``held_bytes``. What a module computed for
    itself when it was made is float32's too: loaded in 16 bits, Gemma's embeddings are scaled by the root of the hidden size as
    those round it."""
    held: dict[torch.nn.Module, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}

    def before(module: torch.nn.Module, _: object, *, recurse: bool = False) -> None:
        held[module] = [(p, p.data) for p in module.parameters(recurse=recurse)]
        for parameter, stored in held[module]:
            parameter.data = stored.float()

    def after(module: torch.nn.Module, *_: object) -> None:
        for parameter, stored in held.pop(module, ()):
            parameter.data = stored

    hooks = []
    at_once = 4 * sum(p.numel() for p in model.parameters()) <= held_bytes
    if at_once:
        before(model, None, recurse=True)
    for module in () if at_once else model.modules():
        if any(p.dtype.itemsize < 4 for p in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    scaled = [(module, module.get_buffer("embed_scale")) for module in model.modules() if hasattr(module, "scalar_embed_scale")]
    for module, rounded in scaled:
        module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float32, device=rounded.device)
    try:
        yield
    finally:
        for module, rounded in scaled:
            module.embed_scale = rounded
        for hook in hooks:
            hook.remove()
        after(model)


@torch.inference_mode()
def verify(folder: str, reference: str, device: str, *, own_code: bool = True) -> dict[str, object]:
    if not own_code:
        import selfpruner.export  # noqa: F401 - registers its classes
    started = time.perf_counter()
    with safe_open(reference, "pt") as file:
        tokens, expected, facts = file.get_tensor("tokens").to(device), file.get_tensor("logits"), file.metadata()
    # It goes on, so that the report can name tensors of another shape.
    how = {"trust_remote_code": own_code, "output_loading_info": True, "ignore_mismatched_sizes": True}
    # A pair, which its type does not say.
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **how)
    model, report = loaded
    model = model.to(device).eval()
    problems = [f"{kind}: {', '.join(sorted(map(str, names))[:3])}" for kind, names in report.items() if names]

    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters != int(facts["parameters"]):
        problems.append(f"{parameters:,} parameters instead of {int(facts['parameters']):,}")

    with exact(model, CONVERTED_BYTES):
        logits = model(tokens, use_cache=False).logits
        scale = float(expected.abs().max())
        bound = TOLERANCE * max(1.0, scale)
        computed = logits[:, -expected.shape[1] :].cpu()
        difference = float((computed - expected).abs().max())
        if not difference <= bound:  # also when it is NaN
            problems.append(f"logits differ by {difference:.3g}, allowed {bound:.3g}")

        cached = model(tokens[:, :-CACHED], use_cache=True)
        rows = []
        for position in range(tokens.shape[1] - CACHED, tokens.shape[1]):
            cached = model(tokens[:, position : position + 1], past_key_values=cached.past_key_values, use_cache=True)
            rows.append(cached.logits)
        cache_difference = float((torch.cat(rows, 1) - logits[:, -CACHED:]).abs().max())
        if not cache_difference <= CACHE_SLACK * bound:
            problems.append(f"logits through the KV cache differ by {cache_difference:.3g}, allowed {CACHE_SLACK * bound:.3g}")

        greedy = _greedy(model, tokens[:1, :PROMPT], CACHE_SLACK * bound)
        if greedy == "different":
            problems.append("greedy generation with the KV cache differs from generation without")

    rounding = 0.0
    if model.dtype != torch.float32:
        rounded = model(tokens, use_cache=False).logits[:, -expected.shape[1] :].float().cpu()
        rounding = float(((rounded - computed).std(-1) / computed.std(-1)).median())
        if not bool(rounded.isfinite().all()):
            problems.append(f"logits are not finite in {_dtype(model)}")
        elif not rounding <= ROUNDING:
            problems.append(f"logits in {_dtype(model)} are {rounding:.2g} of their spread off, allowed {ROUNDING:g}")

    # Without an answer it asks on the terminal, because the config that it reads first has code of its own.
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=own_code)(facts["text"])["input_ids"]
    if ids != json.loads(facts["ids"]):
        problems.append("the tokenizer gives other tokens than the one in memory")

    return {
        "problems": problems,
        "class": type(model).__name__,
        "code": type(model).__module__.split(".")[0],  # "transformers_modules" is the folder's own
        "device": device,
        "dtype": _dtype(model),
        "tokens": tokens.numel(),
        "parameters": parameters,
        "max_difference": difference,
        "cache_difference": cache_difference,
        "allowed_difference": bound,
        "rounding": rounding,
        "max_logit": scale,
        "greedy": greedy,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_mib": _peak_mib(),
    }


def _greedy(model: Any, prompt: torch.Tensor, bound: float) -> str:
    """``equal``, ``tied`` (they part at two tokens of equal logit, up to ``bound``) or ``different``."""
    room = int(model.config.max_position_embeddings) - prompt.shape[1]
    how = {"max_new_tokens": max(min(GENERATED, room), 1), "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    mask = torch.ones_like(prompt)

    def written(*, use_cache: bool) -> list[int]:
        found: list[int] = model.generate(prompt, attention_mask=mask, use_cache=use_cache, **how)[0].tolist()
        return found

    one = written(use_cache=True)
    # Where every token is the likeliest after those before it, writing without a cache gives the same, token by token.
    text = torch.tensor([one], device=prompt.device)
    likeliest = model(text[:, :-1], use_cache=False).logits[0, prompt.shape[1] - 1 :].argmax(-1)
    if likeliest.tolist() == one[prompt.shape[1] :]:
        return "equal"
    two = written(use_cache=False)
    if one == two:
        return "equal"
    parting = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    last = model(torch.tensor([two[:parting]], device=prompt.device), use_cache=False).logits[0, -1].float()
    return "tied" if float((last[one[parting]] - last[two[parting]]).abs()) <= bound else "different"


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


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
    except Exception as error:  # anything that stops a stranger from using the folder is a finding
        result = {"problems": [f"{type(error).__name__}: {error}"]}
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
