"""Both sides of a conversion on the same seeded input: PyTorch's classes with the source, our modules with the policy.

The names and layouts of this module are written out for PyTorch's classes and do not come from the conversion rules, so
that a rule which is wrong cannot vouch for itself. Both sides compute in float32, one stage (an encoder, a layer of the
language model, a head) in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict

from semanticvla_jax.convert import adapter, settings
from semanticvla_jax.convert.detect import VLA, Source, recognise
from semanticvla_jax.convert.io.orbax_reader import PolicyFolder
from semanticvla_jax.models import llama, lora, masks
from semanticvla_jax.models.coupler import ResNetHead
from semanticvla_jax.models.mlp import MLP
from semanticvla_jax.models.semanticvla import SemanticVLA, build
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import ViT

TOLERANCE = 5e-5
_EPSILONS = ("layer_norm_eps", "rms_norm_eps")
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "max_position_embeddings")
BATCH, WORDS = 2, 9  # of the made-up inputs
Pair = tuple[str, Any, Any]  # stage, ours, theirs
State = dict[str, Any]  # tensors of PyTorch by name

TEXT = "fused_featurizer_mm_sampler.text_encoder.text_model."
WHOLE = {"dino": "featurizer.", "siglip": "fused_featurizer.", "text": TEXT, "llm": "language_model."}
PREFIXES = {  # where a source keeps the weights of our towers
  **{kind: WHOLE for kind in VLA},
  "DINOv2, timm": {"dino": ""},
  "DINOv2, Hugging Face": {"dino": ""},
  "SigLIP, timm": {"siglip": ""},
  "SigLIP, Hugging Face": {"siglip": "vision_model.", "text": "text_model."},
  "SigLIP, big_vision": {"siglip": "siglip/", "text": "text/"},
  "Llama, Hugging Face": {"llm": ""},
}
MLPS = {  # our path: PyTorch's layers, a GELU between two of them
  "sparse_fuser/projector": ("projector.fc1", "projector.fc2", "projector.fc3"),
  "sparse_fuser/dino_cue_projector": ("featurizer_sampler_proj.fc1", "featurizer_sampler_proj.fc2"),
  "sparse_fuser/siglip_cue_projector": ("fused_featurizer_sampler_proj.fc1", "fused_featurizer_sampler_proj.fc2"),
  "proprio_projector": ("proprio_projector.fc1", "proprio_projector.fc2"),
  **{
    f"{name}_id_pruner/text_projector": tuple(f"{source}_mm_sampler.text_post_projector.{i}" for i in (0, 2))
    for name, source in (("dino", "featurizer"), ("siglip", "fused_featurizer"))
  },
}
HEADS = {"trans": "model_trans", "rot": "model_rot", "grip": "model_grip", "all": "model"}


class Row(NamedTuple):
  """One compared stage: max |ours - theirs| / max(1, max |theirs|); inf where shapes differ or one is not finite."""

  stage: str
  error: float


def verify(
  sources: Sequence[str | Path],
  policy: str | Path,
  *,
  seed: int = 0,
  merged: bool | None = None,
  say: Callable[[Row], None] = lambda row: None,
) -> tuple[list[Row], list[str]]:
  """Runs every stage that a policy has.

  Args:
    sources: what it was converted from (see detect.recognise).
    policy: the policy folder.
    seed: of the inputs.
    merged: see detect.recognise.
    say: is given each row as soon as it is known.

  Returns:
    (rows, paths of parameters that no stage ran). Where the source's own files say what the policy's model does not do,
    PyTorch's side does what they say, and each such field has its own row, with an error of inf.

  Raises:
    ValueError: torch or transformers is missing, or the source lacks tensors of a stage.
  """
  torch, _ = _libraries()
  sides = _Sides(recognise(sources, merged), PolicyFolder(policy))
  rows = [Row(f"{d.text}, expected {d.expected}", float("inf")) for d in sides.differences()]
  for row in rows:
    say(row)
  with jax.default_matmul_precision("highest"), torch.inference_mode():
    for stage in sides.stages():
      for name, ours, theirs in stage(np.random.default_rng(seed)):
        rows.append(Row(name, _error(ours, theirs)))
        say(rows[-1])
  return rows, [path for path in sides.policy.leaves if not path.startswith(tuple(sides.ran))]


def _libraries() -> tuple[Any, Any]:
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ValueError(
      f"verify needs PyTorch's side: got no module {error.name}; expected torch and transformers; "
      "`pip install -r requirements-parity.txt` (or `make parity`)."
    ) from error
  return torch, transformers


def _error(ours: Any, theirs: Any) -> float:
  ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
  if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
    return float("inf")
  return float(np.abs(ours - theirs).max(initial=0) / max(1.0, np.abs(theirs).max(initial=0)))


class _Sides:
  """A source and the policy made from it.

  Attributes:
    ran: beginnings of our paths that some stage has run.
  """

  def __init__(self, source: Source, policy: PolicyFolder):
    adapter.check(source)
    self.source, self.policy = source, policy
    self.model: SemanticVLA = build(dict(policy.config["model"]) | dict(dtype="float32", remat=None))
    self.lora = policy.config.get("lora") or policy.metadata.get("lora")
    own = adapter.DEFAULTS | (source.adapter or {})
    self.source_lora = self.lora if source.adapter is None else {"rank": own["r"], "alpha": own["lora_alpha"]}
    self.prefixes = PREFIXES[source.kind]
    self.ran: list[str] = []

  def differences(self) -> list[settings.Difference]:
    """What the source's own files say and the policy's model does not do, of the towers that the policy has."""
    prefixes = self.source.prefixes
    if prefixes != ("",):
      prefixes = tuple(p for p in prefixes if any(path.startswith(p) for path in self.policy.leaves))
    return settings.differences(self.source, self.model, prefixes)

  def stages(self) -> Iterator[Callable[[np.random.Generator], Iterator[Pair]]]:
    """What can be run, one after the other."""
    towers = {"dino": self.image_tower, "siglip": self.image_tower, "text": self.text_tower, "llm": self.llm}
    for name, run in towers.items():
      if self._has(f"{name}/"):
        if name not in self.prefixes:
          raise self._lacks(f"a tower for {name}/")
        yield lambda rng, name=name, run=run: run(name, rng)
    fused = {
      f"dense_fuser/pair_{p}_{which}": tuple(f"cross_vit_model.aggregate_proj.{2 * p + v}.{i}" for i in (0, 2))
      for p in range(len(self.model.dense_fuser.pairs) if self.model.dense_fuser else 0)
      for v, which in enumerate(("first", "second"))
    }
    for path, keys in (MLPS | fused).items():
      if self._has(f"{path}/"):
        yield lambda rng, path=path, keys=keys: self.mlp(path, keys, rng)
    for ours, key in HEADS.items():
      if self._has(f"coupler/{ours}/"):
        yield lambda rng, ours=ours, key=key: self.head(f"coupler/{ours}", f"action_head.{key}", rng)

  def _has(self, prefix: str) -> bool:
    found = any(path.startswith(prefix) for path in self.policy.leaves)
    self.ran += [prefix] if found else []
    return found

  def params(self, prefix: str, layer: int | None = None) -> dict:
    """Our parameters below a prefix (of one layer of a stack), float32, adapters folded in."""
    paths = [path for path in self.policy.leaves if path.startswith(prefix)]
    flat = {path.removeprefix(prefix): self.policy.read(path, layer).astype(np.float32) for path in paths}
    tree = unflatten_dict(flat, sep="/")
    adapted = any(path.endswith("lora_a") for path in flat)
    return lora.merge(tree, self.lora["rank"], self.lora["alpha"]) if adapted else tree

  def state(self, prefix: str) -> State:
    """PyTorch's tensors below a prefix, float32, adapters folded in as peft does it."""
    keys = [key for key in self.source.tensors if key.startswith(prefix) and ".lora_" not in key]
    return {key.removeprefix(prefix): self._tensor(key) for key in keys}

  def _tensor(self, key: str) -> Any:
    torch, _ = _libraries()
    if key not in self.source.tensors:
      raise self._lacks(key)
    stored = self.source.tensors[key]
    x = torch.from_numpy(stored.read().astype(np.float32))
    a, b = (self.source.tensors.get(key.removesuffix("weight") + f"lora_{ab}.weight") for ab in "AB")
    if a is None or b is None or not key.endswith(".weight"):
      return x
    if not self.source_lora:
      raise ValueError(
        f"Source has adapters: got {stored.name} and a policy without `lora`; expected the policy that was made from "
        "these files; pass the same --source paths as in to-orbax."
      )
    a, b = (torch.from_numpy(y.read().astype(np.float32)) for y in (a, b))
    x = x + self.source_lora["alpha"] / self.source_lora["rank"] * (b.flatten(1) @ a.flatten(1)).reshape(x.shape)
    if self.policy.adapted:
      return x
    return torch.from_numpy(x.numpy().astype(stored.dtype).astype(np.float32))  # it was stored like this when merged

  def _lacks(self, what: str) -> ValueError:
    return ValueError(
      f"Source lacks {what}: got {self.source.kind} ({', '.join(path.name for path in self.source.paths[:4])}); "
      "expected what the policy was converted from; pass all of its --source paths."
    )

  def image_tower(self, name: str, rng: np.random.Generator) -> Iterator[Pair]:
    """The blocks that the model runs, no final norm, on images of noise; FiLM by a random condition."""
    torch, transformers = _libraries()
    vit: ViT = getattr(self.model, name).clone()
    depth = vit.depth - (self.model.vision_layer == "second_to_last")
    state, film = _apart(_blocks_below(self._hugging_face(name), depth))
    pixels = jnp.asarray(rng.standard_normal((BATCH, vit.image, vit.image, 3)), jnp.float32)
    widths = {x.shape[1] for x in film.values() if x.ndim == 2}
    condition = jnp.asarray(rng.standard_normal((BATCH, widths.pop())), jnp.float32) if film else None
    own = settings.fields(self.source, name)
    if name == "dino":
      theirs = _built(transformers.Dinov2WithRegistersModel, dinov2_config(vit, depth), own)
      theirs.layernorm, layers, norm = torch.nn.Identity(), theirs.encoder.layer, "norm2"
    else:
      theirs = _built(transformers.SiglipVisionModel, siglip_config(vit, depth), own)
      theirs.post_layernorm, layers, norm = torch.nn.Identity(), theirs.encoder.layers, "layer_norm2"
    _load(theirs, state, name)
    for i, layer in enumerate(layers if film else ()):
      getattr(layer, norm).register_forward_pre_hook(_modulate(film, i, torch.from_numpy(np.array(condition))))
    expected = theirs(torch.from_numpy(rearrange(np.array(pixels), "b h w c -> b c h w"))).last_hidden_state

    def run(module, pixels, condition):
      return module.run(module.embed(pixels), 0, depth, condition)[0]

    yield name, vit.apply({"params": self.params(f"{name}/")}, pixels, condition, method=run), expected

  def _hugging_face(self, name: str) -> State:
    """The weights of a tower by the names of its class in transformers."""
    state = self.state(self.prefixes[name])
    if self.source.kind == "SigLIP, big_vision":
      return from_big_vision(state)
    if name != "text" and (self.source.kind in VLA or self.source.kind.endswith("timm")):
      return dinov2_from_timm(state) if name == "dino" else siglip_from_timm(state)
    return state

  def text_tower(self, name: str, rng: np.random.Generator) -> Iterator[Pair]:
    torch, transformers = _libraries()
    tower: TextEncoder = self.model.text.clone()
    theirs = _built(transformers.SiglipTextModel, siglip_text_config(tower), settings.fields(self.source, name))
    theirs.head = torch.nn.Identity()  # the pooled vector is not used
    _load(theirs, self._hugging_face(name), name)
    length = min(WORDS, tower.positions)
    ids = rng.integers(2, tower.vocab, (BATCH, length))
    words = np.arange(length) < np.array([[length], [length // 2 + 1]])
    states = theirs(torch.from_numpy(ids), attention_mask=torch.from_numpy(words).long()).last_hidden_state
    ours = tower.apply({"params": self.params("text/")}, jnp.asarray(ids, jnp.int32), jnp.asarray(words))
    yield name, np.asarray(ours)[words], states.numpy()[words]

  def llm(self, name: str, rng: np.random.Generator) -> Iterator[Pair]:
    """Layer by layer, each side on its own states; the error is that after the last one."""
    torch, transformers = _libraries()
    sizes, prefix = self.model.llm, self.prefixes[name]
    valid = np.arange(WORDS) < np.array([[WORDS], [WORDS // 2 + 1]])
    ids = rng.integers(0, sizes.vocab, (BATCH, WORDS))
    x = self.params("llm/embed/")["embedding"][ids]
    noise = x.std() * rng.standard_normal(x.shape).astype(np.float32)  # rows that are alike would hide positions
    x, y = jnp.asarray(x + noise), self._tensor(f"{prefix}model.embed_tokens.weight")[ids] + torch.from_numpy(noise)
    one = _built(transformers.LlamaModel, llama_config(sizes, depth=1, vocab=8), settings.fields(self.source, name))
    one.norm = torch.nn.Identity()
    block = llama.Block(sizes.num_heads, sizes.mlp_dim, sizes.eps, sizes.theta)
    positions = masks.positions(jnp.asarray(valid))
    allowed = masks.attention_mask(jnp.asarray(valid), jnp.zeros(WORDS, bool), "causal")
    run = jax.jit(lambda params, x: block.apply({"params": params}, x, positions, allowed, None, 0)[0])
    for i in range(sizes.depth):
      stacked = any(path.startswith("llm/layers/") for path in self.policy.leaves)
      x = run(self.params("llm/layers/", i) if stacked else self.params(f"llm/layers_{i}/"), x)
      _load(one.layers[0], self.state(f"{prefix}model.layers.{i}."), f"layer {i}")
      y = one(inputs_embeds=y, attention_mask=torch.from_numpy(valid).long()).last_hidden_state
    x = nn.RMSNorm(epsilon=sizes.eps).apply({"params": self.params("llm/norm/")}, x)
    scale, eps = self._tensor(f"{prefix}model.norm.weight"), one.config.rms_norm_eps
    y = torch.nn.functional.rms_norm(y, y.shape[-1:], scale, eps)
    yield name, np.asarray(x)[valid], y.numpy()[valid]
    if self._has("llm/lm_head/"):
      logits = x @ self.params("llm/lm_head/")["kernel"]
      yield f"{name} logits", np.asarray(logits)[valid], (y @ self._tensor(f"{prefix}lm_head.weight").T).numpy()[valid]

  def mlp(self, path: str, keys: Sequence[str], rng: np.random.Generator) -> Iterator[Pair]:
    torch, _ = _libraries()
    layers = [(self._tensor(f"{key}.weight"), self._tensor(f"{key}.bias")) for key in keys]
    y = torch.from_numpy(rng.standard_normal((BATCH, layers[0][0].shape[1])).astype(np.float32))
    ours = MLP(tuple(w.shape[0] for w, _ in layers)).apply({"params": self.params(f"{path}/")}, jnp.asarray(y))
    for i, (weight, bias) in enumerate(layers):
      y = torch.nn.functional.linear(y if i == 0 else torch.nn.functional.gelu(y), weight, bias)
    yield path, ours, y

  def head(self, path: str, key: str, rng: np.random.Generator) -> Iterator[Pair]:
    """LayerNorm, linear, ReLU, two residual [LayerNorm, linear, ReLU], LayerNorm, linear."""
    torch, _ = _libraries()
    functional = torch.nn.functional

    def norm(y, name):
      return functional.layer_norm(y, y.shape[-1:], self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    def linear(y, name):
      return functional.linear(y, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    shape = self.source.tensors[f"{key}.fc1.weight"].shape
    x = rng.standard_normal((BATCH, 1, shape[1])).astype(np.float32)
    y = functional.relu(linear(norm(torch.from_numpy(x), f"{key}.layer_norm1"), f"{key}.fc1"))
    for i in range(2):
      block = f"{key}.mlp_resnet_blocks.{i}.ffn"
      y = y + functional.relu(linear(norm(y, f"{block}.0"), f"{block}.1"))
    y = linear(norm(y, f"{key}.layer_norm2"), f"{key}.fc2")
    head = ResNetHead(shape[0], y.shape[-1])
    yield path, head.apply({"params": self.params(f"{path}/")}, jnp.asarray(x)), y


def siglip_config(vit: ViT, depth: int, **more: Any) -> Any:
  """transformers' configuration of an image tower of our sizes; without its pooling head unless asked for."""
  _, transformers = _libraries()
  act = {"erf": "gelu", "tanh": "gelu_pytorch_tanh"}[vit.gelu]
  fields = dict(**_encoder_sizes(vit, depth), image_size=vit.image, patch_size=vit.patch, hidden_act=act)
  return transformers.SiglipVisionConfig(**fields | dict(vision_use_head=False) | more)


def dinov2_config(vit: ViT, depth: int) -> Any:
  """transformers' configuration of a DINOv2 with registers of our sizes."""
  _, transformers = _libraries()
  sizes = _encoder_sizes(vit, depth)
  ratio = sizes.pop("intermediate_size") // vit.width
  fields = dict(image_size=vit.image, patch_size=vit.patch, mlp_ratio=ratio, num_register_tokens=vit.registers)
  return transformers.Dinov2WithRegistersConfig(**sizes, **fields)


def siglip_text_config(tower: TextEncoder) -> Any:
  """transformers' configuration of a text tower of our sizes."""
  _, transformers = _libraries()
  ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
  fields = dict(vocab_size=tower.vocab, max_position_embeddings=tower.positions, projection_size=tower.width)
  return transformers.SiglipTextConfig(**_encoder_sizes(tower, tower.depth), **fields, **ids)


def llama_config(sizes: llama.Llama, depth: int, vocab: int) -> Any:
  """transformers' configuration of a decoder of our sizes."""
  _, transformers = _libraries()
  rope = dict(rope_parameters=dict(rope_type="default", rope_theta=sizes.theta))
  return transformers.LlamaConfig(**_encoder_sizes(sizes, depth), vocab_size=vocab, rms_norm_eps=sizes.eps, **rope)


def _built(cls: Any, config: Any, fields: Mapping[str, Any] | None) -> Any:
  """PyTorch's class in our sizes, with what the source's own files (None: there are none) say beside them.

  Raises:
    ValueError: the class does not take what they say.
  """
  try:
    return cls(config if fields is None else _own(config, fields)).eval()
  except (ValueError, TypeError, KeyError) as error:
    said = (str(error).strip().splitlines() or [""])[-1][:160]
    raise ValueError(
      f"{cls.__name__} refuses the source's own configuration: got {type(error).__name__}: {said}; expected a "
      "config.json that transformers reads; mend it."
    ) from error


def _own(config: Any, fields: Mapping[str, Any]) -> Any:
  """A configuration with the source's own fields; those that change shapes stay, or the tensors could not be loaded."""
  _, transformers = _libraries()
  default, kept = type(config)(), config.to_dict()
  own = {name: fields.get(name, getattr(default, name)) for name in _EPSILONS if hasattr(default, name)}
  act = fields.get("hidden_act", default.hidden_act)
  act = settings.NAMES.get(settings.ACTIVATIONS.get(act, act), act)
  own |= {"hidden_act": act} if act in transformers.activations.ACT2FN else {}  # else `differences` reports it
  same_width = fields.get("hidden_size", default.hidden_size) == config.hidden_size
  heads = fields.get("num_attention_heads", default.num_attention_heads if same_width else 0)
  if heads and config.hidden_size % heads == 0:
    own["num_attention_heads"] = heads
    kept = {name: x for name, x in kept.items() if name not in ("num_key_value_heads", "head_dim")}
  if "rope_parameters" in kept:
    own |= {"rope_parameters": None} | {name: fields[name] for name in _ROPE if fields.get(name)}
  return type(config)(**{name: x for name, x in kept.items() if name != "model_type"} | own)


def _encoder_sizes(x: Any, depth: int) -> dict:
  return dict(
    hidden_size=x.width, intermediate_size=x.mlp_dim, num_hidden_layers=depth, num_attention_heads=x.num_heads
  )


def _load(module: Any, state: State, what: str) -> None:
  """Loads what the module has; raises ValueError where the source lacks some of it."""
  own = module.state_dict()
  if missing := sorted(set(own) - set(state)):
    raise ValueError(
      f"Source lacks weights of {what}: got no {', '.join(missing[:4])}; expected {len(own)} tensors; name all files."
    )
  if wrong := [key for key, x in own.items() if x.shape != state[key].shape]:
    key = wrong[0]
    raise ValueError(
      f"{what}: got {key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}; verify a policy of this source."
    )
  module.load_state_dict({key: state[key] for key in own})


def _apart(state: State) -> tuple[State, State]:
  """(weights of the class, FiLM's weights)."""
  film = {key: x for key, x in state.items() if re.search(r"\.(scale|shift)\.", key)}
  return {key: x for key, x in state.items() if key not in film}, film


def _blocks_below(state: State, depth: int) -> State:
  number = re.compile(r"encoder\.layers?\.(\d+)\.")
  return {key: x for key, x in state.items() if not (m := number.match(key)) or int(m[1]) < depth}


def _modulate(film: State, i: int, condition: Any) -> Callable:
  """A hook before a block's second norm: changes the residual stream itself, after the attention."""
  weights = {key.split(".", 3)[3]: x for key, x in film.items() if key.split(".")[2] == str(i)}
  gamma, beta = (condition @ weights[f"{n}.weight"].T + weights[f"{n}.bias"] for n in ("scale", "shift"))

  def hook(module, inputs):
    inputs[0].mul_(1 + gamma[:, None]).add_(beta[:, None])

  return hook


def siglip_from_timm(state: State) -> State:
  """timm's names of a SigLIP image tower → those of transformers' SiglipVisionModel."""
  renames = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.{}_proj."),
    (r"blocks\.(\d+)\.", r"encoder.layers.\1."),
  )
  out = _renamed(state, renames)
  if "pos_embed" in out:
    out["embeddings.position_embedding.weight"] = out.pop("pos_embed")[0]
  return out


def dinov2_from_timm(state: State) -> State:
  """timm's names of a DINOv2 with registers → those of transformers' Dinov2WithRegistersModel."""
  torch, _ = _libraries()
  renames = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("cls_token", "embeddings.cls_token"),
    ("reg_token", "embeddings.register_tokens"),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.o_proj."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layer.\1.attention.{}_proj."),
    (r"blocks\.(\d+)\.ls(\d)\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1"),
    (r"blocks\.(\d+)\.", r"encoder.layer.\1."),
  )
  out = _renamed(state, renames)
  if "pos_embed" in out:
    positions = out.pop("pos_embed")
    none = torch.zeros_like(positions[:, :1])  # timm adds no position to the class token
    out["embeddings.position_embeddings"] = torch.cat([none, positions], dim=1)
    out["embeddings.mask_token"] = none[0]
  return out


def _renamed(state: State, renames: Sequence[tuple[str, str]]) -> State:
  """New names; a name with "{}" is that of a fused q, k, v, which is split."""
  out = {}
  for key, x in state.items():
    for pattern, name in renames:
      if re.match(pattern, key):
        key = re.sub(f"^{pattern}", name, key)
        break
    if "{}" in key:
      out |= {key.format(name): part for name, part in zip("qkv", x.chunk(3))}
    else:
      out[key] = x
  return out


def from_big_vision(state: State) -> State:
  """big_vision's names and layouts of either SigLIP tower → those of transformers' classes."""
  attention = "MultiHeadDotProductAttention_0"
  renames = (
    (r"(Transformer|Encoder_0)/encoderblock_(\d+)/", r"encoder.layers.\2."),
    ("LayerNorm_0", "layer_norm1"),
    ("LayerNorm_1", "layer_norm2"),
    (r"MlpBlock_0/Dense_0", "mlp.fc1"),
    (r"MlpBlock_0/Dense_1", "mlp.fc2"),
    ("Transformer/encoder_norm", "post_layernorm"),
    ("Encoder_0/encoder_norm", "final_layer_norm"),
    ("^embedding/", "embeddings.patch_embedding/"),
    ("^Embed_0/embedding", "embeddings.token_embedding.weight"),
    ("^pos_embedding", "embeddings.position_embedding.weight"),
    (f"{attention}/(query|key|value)/", lambda m: f"self_attn.{m[1][0]}_proj."),
    (f"{attention}/out/", "self_attn.out_proj."),
    (r"[./](kernel|scale)$", ".weight"),
    (r"/bias$", ".bias"),
  )
  out = {}
  for key, x in state.items():
    name = key
    for pattern, new in renames:
      name = re.sub(pattern, new, name)
    if key.endswith("kernel"):
      out_proj = key.endswith("out/kernel")
      x = x.permute(3, 2, 0, 1) if x.ndim == 4 else (x.flatten(0, 1) if out_proj else x.flatten(1)).T
    elif "embeddings.position" in name:
      x = x[0]
    elif attention in key:
      x = x.flatten()
    out[name] = x
  return out
