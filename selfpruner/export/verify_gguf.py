"""Read a GGUF file back and compare what it computes with what was computed before anything was written.

    python -m selfpruner.export.verify_gguf FOLDER REFERENCE [--device cpu]

FOLDER holds one GGUF file; REFERENCE is described in :mod:`selfpruner.export.base`. A model is rebuilt from the file's metadata and
dequantised tensors alone, with the layer shapes, numbers and rotary embedding that the metadata give. Its logits are compared, and
so are the parameters and the ids of a text. Where llama-cpp-python is installed, llama.cpp does the same: it loads the file,
tokenises, and computes logits with a float32 KV cache. Prints one JSON object: the numbers and ``problems``.

What is compared is the error of the logits relative to their spread, both without each position's mean; logits of unrelated models
differ by 1.4 of it. ``_ERROR`` says how much is allowed for the coarsest type in the file. The largest absolute difference is
reported but not judged: a few tokens with huge hidden states multiply rounding by a thousand.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader, quants
from pydantic import BaseModel, Field
from safetensors import safe_open
from torch import Tensor, nn

from selfpruner.export import gguf_runtime, gguf_tokenizer
from selfpruner.export.modeling_selfpruner import SelfPrunerConfig, SelfPrunerForCausalLM
from selfpruner.models.memory import peak_mib

_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# SmolLM2-135M at 30 % in llama.cpp, against logits in bfloat16: 0.023 stored as f32, 0.06 as q8_0, 0.25 as q5_0, 0.47 as q4_0.
_ERROR = {"F32": 0.005, "F16": 0.03, "BF16": 0.1, "Q8": 0.2, "Q6": 0.3, "Q5": 0.5, "Q4": 0.7, "Q3": 0.9, "Q2": 1.1}
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@torch.inference_mode()
def verify(folder: Path, reference: str, device: str) -> dict[str, object]:
    """The findings; ``problems`` is empty when the file is good."""
    started = time.perf_counter()
    with safe_open(reference, "pt") as file:
        tokens, expected, facts = file.get_tensor("tokens"), file.get_tensor("logits"), file.metadata()
    (path,) = folder.glob("*.gguf")
    reader = GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    problems: list[str] = []

    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != "rope_freqs.weight")
    if parameters != int(facts["parameters"]):
        problems.append(f"{parameters:,} parameters instead of {int(facts['parameters']):,}")
    ids = json.loads(facts["ids"])
    if gguf_tokenizer.encode(keys, facts["text"]) != ids:
        problems.append("the file's tokenizer gives other tokens than the checkpoint's")

    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    dtype = getattr(torch, facts["dtype"])
    compare = _Comparison(expected, {*types, _STORED[facts["dtype"]]})
    model = rebuild(keys, reader, dtype).to(device)
    numbers = {"": compare(model(tokens.to(device), use_cache=False).logits.float().cpu(), "", problems)}
    del model
    version = None
    if gguf_runtime.installed():
        runtime = gguf_runtime.LlamaCpp(path, tokens.shape[1])
        version = runtime.version
        logits = torch.stack([torch.from_numpy(runtime.logits(row)) for row in tokens.tolist()])
        numbers["llama_cpp_"] = compare(logits, " in llama.cpp", problems)
        if runtime.tokenize(facts["text"]) != ids:
            problems.append("llama.cpp gives other tokens than the checkpoint's tokenizer")
        runtime.close()
    return {
        "problems": problems,
        "architecture": keys["general.architecture"],
        "types": dict(sorted(types.items())),
        "bytes": path.stat().st_size,
        "device": device,
        "dtype": facts["dtype"],
        "tokens": tokens.numel(),
        "parameters": parameters,
        **{prefix + name: value for prefix, pair in numbers.items() for name, value in pair.items()},
        "max_logit": compare.scale,
        "allowed_error": compare.allowed,
        "llama_cpp": version,
        "gguf": importlib.metadata.version("gguf"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_mib": round(peak_mib()),
    }


class _Comparison:
    """``expected`` (B, P, V) are the logits of the last P positions; ``types`` are the file's, and what they were computed in."""

    def __init__(self, expected: Tensor, types: set[str]) -> None:
        self._expected = expected
        self.scale = float(expected.abs().max())
        self.allowed = max(_ERROR[name.split("_")[0]] for name in types)

    def __call__(self, logits: Tensor, where: str, problems: list[str]) -> dict[str, float]:
        difference = logits[:, -self._expected.shape[1] :] - self._expected
        spread = (self._expected - self._expected.mean(-1, keepdim=True)).pow(2).mean()
        error = (difference - difference.mean(-1, keepdim=True)).pow(2).mean()
        figures = {"max_difference": float(difference.abs().max()), "error": float((error / spread).sqrt())}
        if not figures["error"] <= self.allowed:  # also when it is NaN
            problems.append(f"logits{where} differ by {figures['error']:.3g} of their spread, allowed {self.allowed:.3g}")
        return figures


class _Numbers(BaseModel):
    """What a file says of its model, under the name of its architecture; a list has one number for each layer."""

    vocab_size: int
    block_count: int
    context_length: int
    embedding_length: int
    heads: int | list[int] = Field(alias="attention.head_count")
    groups: int | list[int] = Field(alias="attention.head_count_kv")
    channels: int | list[int] = Field(alias="feed_forward_length")
    head_dim: int = Field(alias="attention.key_length")
    epsilon: float = Field(alias="attention.layer_norm_rms_epsilon")
    rope_base: float = Field(alias="rope.freq_base")
    rope_type: str = Field("default", alias="rope.scaling.type")
    rope_factor: float | None = Field(None, alias="rope.scaling.factor")
    rope_context: int | None = Field(None, alias="rope.scaling.original_context_length")

    def by_layer(self, numbers: int | list[int]) -> list[int]:
        return numbers if isinstance(numbers, list) else [numbers] * self.block_count


def rebuild(keys: Mapping[str, object], reader: GGUFReader, dtype: torch.dtype) -> nn.Module:
    """The model that a file describes, in ``dtype``: a reader of its own, which shares nothing with the writer."""
    architecture = keys["general.architecture"]
    own = _Numbers.model_validate({key.removeprefix(f"{architecture}."): value for key, value in keys.items()})
    head_dim, heads, groups = own.head_dim, own.by_layer(own.heads), own.by_layer(own.groups)
    tensors: dict[str, Tensor] = {}
    factors = None
    for stored in reader.tensors:
        values = torch.tensor(quants.dequantize(stored.data, stored.tensor_type), dtype=dtype)
        if stored.name == "rope_freqs.weight":
            factors = values
            continue
        *block, name, kind = stored.name.split(".")
        if name == "attn_qkv":
            layer = int(block[1])
            sizes = [count * head_dim for count in (heads[layer], groups[layer], groups[layer])]
            for part, rows in zip("qkv", values.split(sizes), strict=True):
                tensors[f"model.layers.{layer}.{_NAMES[f'attn_{part}']}.{kind}"] = rows
            continue
        if architecture in ("deci", "llama") and name in ("attn_q", "attn_k"):
            values = values.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_NAMES[name]}.{kind}"] = values
    mlp, attention = "model.layers.{}.mlp.", "model.layers.{}.self_attn."
    layers = {
        index: {
            "num_attention_heads": heads[index],
            "num_key_value_heads": groups[index],
            "intermediate_size": width,
            "attention_bias": attention.format(index) + "q_proj.bias" in tensors,
            "o_proj_bias": attention.format(index) + "o_proj.bias" in tensors,
            "mlp_bias": mlp.format(index) + "gate_proj.bias" in tensors,
            "down_proj_bias": mlp.format(index) + "down_proj.bias" in tensors,
        }
        for index, width in enumerate(own.by_layer(own.channels))
    }
    rope: dict[str, object] = {"rope_type": own.rope_type, "rope_theta": own.rope_base}
    if own.rope_factor is not None:
        rope["factor"] = own.rope_factor
    if own.rope_context is not None:
        rope["original_max_position_embeddings"] = own.rope_context
    common: dict[str, object] = {key: max(layer[key] for layer in layers.values()) for key in layers[0]}
    body: dict[str, object] = {
        "vocab_size": own.vocab_size,
        "hidden_size": own.embedding_length,
        "num_hidden_layers": own.block_count,
        **common,
        "per_layer_config": {
            index: changed
            for index, layer in layers.items()
            if (changed := {key: value for key, value in layer.items() if value != common[key]})
        },
        "head_dim": head_dim,
        "qk_norm": attention.format(0) + "q_norm.weight" in tensors,
        "rms_norm_eps": own.epsilon,
        "max_position_embeddings": own.context_length,
        "rope_parameters": rope,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "pad_token_id": None,
    }
    config = SelfPrunerConfig.from_dict(body)
    with torch.device("meta"):
        model = SelfPrunerForCausalLM._from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    model.load_state_dict(tensors, assign=True)
    # Its table is computed, not stored, and was computed on the meta device above.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if factors is not None:
        model.model.rotary_emb.inv_freq /= factors.float()
    rebuilt: nn.Module = model.train(False)
    return rebuilt


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    try:
        result = verify(options.folder, options.reference, options.device)
    except torch.OutOfMemoryError as error:
        result = {"problems": [str(error)], "out_of_memory": True}
    except Exception as error:  # anything that stops the file from being read is a finding
        result = {"problems": [f"{type(error).__name__}: {error}"]}
    print(json.dumps(result))
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
