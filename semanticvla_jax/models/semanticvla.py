"""SemanticVLA: images, proprioception, an instruction → a chunk of actions in one pass (SemanticVLA Figure 2, Eq. 1).

    instruction ─ text ─► words                                    images ─ normalize, once per encoder ─► pixels
                            │                                                │
                            │          siglip ──────── dense_fuser ──────── dino + aggregation tokens (FiLM by prompt)
                            ▼            │                                    │
                        IDPruner ◄───────┘                               SAPruner
                            │ cues, anchors                                   │ aggregated
                            └──────────────► sparse_fuser ◄───────────────────┘
                                                  │ visual tokens of all views
                  [ <s> | visual | proprio | prompt | action placeholders | </s> ]
                                                  │ llm, bidirectional over the action block
                                               coupler ─► actions f32[b k a]

The baselines are rows of the same code: OpenVLA-OFT (no pruners, no fuser, one head) and OpenVLA (no coupler either:
a token for each action dimension, spoken behind the prompt). `build` is where a config decides which parts exist.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax.core import FrozenDict, freeze, unfreeze
from jaxtyping import Array, Bool, Float, Int

from semanticvla_jax.action_tokens import ActionTokenizer
from semanticvla_jax.models import checks, compressor, coupler, decoder_pruner, fast, fuser, llama, masks
from semanticvla_jax.models.config import DEFAULTS, VARIANTS, resolve  # noqa: F401 (`build` goes by them)
from semanticvla_jax.models.coupler import EXTRA_ROWS, Coupler, tokens_to_actions
from semanticvla_jax.models.decoder_pruner import DecoderPruner, pruned_states
from semanticvla_jax.models.fast import STOP
from semanticvla_jax.models.fuser import DenseFuser, SparseFuser
from semanticvla_jax.models.llama import Llama
from semanticvla_jax.models.mlp import MLP
from semanticvla_jax.models.pruner import KINDS, Encoded, IDPruned, Words, kinds, noise
from semanticvla_jax.models.speech import Spoken, speak
from semanticvla_jax.models.text import TextEncoder
from semanticvla_jax.models.vit import ViT
from semanticvla_jax.types import Observation, Sentence

# DINOv2's ImageNet constants as openvla-7b's preprocessor file holds them: written through bfloat16.
DINO_MEAN, DINO_STD = (0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375)


@flax.struct.dataclass
class Output:
  """Actions f32[b k a], normalized; what led to them, by name: free under jit when unread; what to remember."""

  actions: Float[Array, "b k a"]
  intermediates: dict[str, Any]
  memory: Any = None  # for the next query of the same episode, see history.py; None for a model without


class SemanticVLA(nn.Module):
  """The whole forward pass. A part that a model lacks is None.

  Parameters are named after these fields, those of a pruner "{encoder}_{kind}_pruner".
  """

  preserve_adopted_names: ClassVar[bool] = True  # flax: a part that was built with a name keeps it

  dino: ViT | None
  siglip: ViT | None
  text: TextEncoder | None
  pruners: Mapping[str, tuple[nn.Module, ...]]  # of each encoder, see pruner.Pruner
  dense_fuser: DenseFuser | None
  sparse_fuser: SparseFuser
  compressor: nn.Module | None
  proprio_projector: MLP | None
  llm: Llama
  coupler: Coupler | None
  film: tuple[str, ...]
  film_pool: str
  vision_layer: str
  mask: str
  shift: bool  # the coupler reads states one position early: [last prompt token, O_0 … O_{n-2}]
  chunk: int
  num_views: int
  proprio_dim: int | None
  optional_views: tuple[int, ...] = ()  # a black image of one is padding, and its tokens are hidden
  decoder_pruner: DecoderPruner | None = None
  spoken_dims: int = 7  # action dimensions, of a model that speaks a token for each
  decoding: str = "greedy"
  codec: ActionTokenizer | None = None  # FAST's tokens instead, of which a chunk has different numbers
  cue_stop: tuple[int, ...] = ()  # ids of instruction tokens that cannot be cues

  def __call__(
    self,
    observation: Observation,
    train: bool = False,
    pixels: dict | None = None,
    part: tuple[Int[Array, ""], int] | None = None,
    sentence: Sentence | None = None,
    memory: Any = None,
    updates: Int[Array, ""] | int = 0,
  ) -> Output:
    """Observation → actions.

    Args:
      observation: see types.Observation.
      train: draws the pruners' noise (needs an rng named 'noise').
      pixels: {encoder: f[b v h w 3]}, images that are normalized already, instead of `observation.images`.
      part: (i, p) where these are the examples i, i + p, i + 2p, … of a batch: their noise is what they have in it.
      sentence: what `self.sentence` made of the instructions; the observation's own are not read then (may be None).
      memory: of the Output of each episode's last query; None where all begin, which is all of training.
      updates: of the training so far, by which LightVLA's noise falls.
    """
    if self.coupler is None:
      spoken = self.generate(observation, pixels, sentence=sentence)
      if self.codec is not None:
        actions, whole = fast.actions(spoken.ids, self.codec, self.spoken_vocab)
        return Output(actions, {"ids": spoken.ids, "passes": spoken.passes, "malformed": ~whole})
      actions = tokens_to_actions(spoken.ids, self.spoken_vocab)
      return Output(rearrange(actions, "b (k a) -> b k a", k=self.chunk), {"ids": spoken.ids, "passes": spoken.passes})
    x, valid, seen = self.read(observation, train, pixels, part, sentence)
    b, prefix = valid.shape
    n = self.chunk * self.coupler.tokens
    stop = self.llm.embed_tokens(jnp.full((b, 1), STOP))
    x = jnp.concatenate([x, jnp.zeros((b, n, x.shape[-1]), x.dtype), stop], axis=1)  # placeholders are zeros (Eq. 10)
    valid = jnp.concatenate([valid, jnp.ones((b, n + 1), bool)], axis=1)
    block = jnp.arange(prefix + n + 1) >= prefix
    allowed, positions = masks.attention_mask(valid, block, self.mask), masks.positions(valid)
    read = jnp.broadcast_to(prefix + jnp.arange(n), (b, n))
    if self.shift:
      read = jnp.concatenate([_last(seen["context"], seen["prompt_mask"])[:, None], read[:, :-1]], axis=1)
    seen |= dict(sequence=x, valid=valid, allowed=allowed, positions=positions)
    if self.llm.routing is not None:
      visual = seen["views"].shape[1] * self.num_views
      words = valid & ~block & (jnp.arange(len(block)) > visual)
      hidden, states = self.llm.routed_states_at(x, positions, allowed, read, valid, words, visual)
    elif self.decoder_pruner is None:
      hidden, states = self.llm.states_at(x, positions, allowed, read)
    else:
      last = _last(seen["context"], seen["prompt_mask"])
      training = (updates, part) if train else None
      hidden, states, memory = pruned_states(self, self.decoder_pruner, seen, block, read, last, memory, training)
    seen |= dict(hidden=hidden, action_states=states)
    return Output(self.coupler(states), seen, memory)

  def sentence(self, observation: Observation, modulate: bool = False) -> Sentence:
    """What the instruction alone decides; with `modulate`, every block's FiLM too. Images are not looked at."""
    prompt, mask = self.llm.embed_tokens(observation.prompt), observation.prompt_mask
    condition = {}
    if self.film:
      pooled, encoders = self.pool(prompt, mask), self._encoders()
      each = {name: (encoders[name], self._blocks(encoders[name])) for name in self.film}
      condition = {name: vit.modulations(pooled, n) if modulate else pooled for name, (vit, n) in each.items()}
    if self.text is None:
      return Sentence(prompt, mask, condition)
    if observation.instruction is None:
      raise ValueError(
        "observation: got no instruction tokens, expected i32[b m] of the SigLIP tokenizer (this model prunes by the "
        "instruction); tokenize the instruction with semanticvla_jax.data.text."
      )
    words = self.text(observation.instruction, observation.instruction_mask)
    projected = {
      pruner.name: pruner.project(words, vit.width)
      for name, vit in self._encoders().items()
      for pruner in self.pruners[name]
      if pruner.reads_words and hasattr(pruner, "project")
    }
    stop = jnp.isin(observation.instruction, jnp.array(self.cue_stop)) if self.cue_stop else None
    return Sentence(prompt, mask, condition, words, observation.instruction_mask, projected, stop)

  def read(
    self,
    observation: Observation,
    train: bool = False,
    pixels: dict | None = None,
    part: tuple | None = None,
    sentence: Sentence | None = None,
  ):
    """[ <s> | visual | proprio | prompt ] as embeddings f[b l D], their validity bool[b l], and intermediates."""
    self._check(observation)
    sentence = self.sentence(observation) if sentence is None else sentence
    prompt, mask = sentence.prompt, sentence.prompt_mask
    pixels = self.normalize(observation.images) if pixels is None else pixels
    visual, seen = self.see(pixels, sentence, train, part)
    parts = [prompt[:, :1], visual]
    if self.proprio_projector is not None:
      parts.append(self.proprio_projector(observation.proprio.astype(visual.dtype))[:, None])
    context = jnp.concatenate(parts, axis=1)
    there = masks.seen(observation.images, self.optional_views, visual.shape[1], context.shape[1])
    if "shown" in seen:
      there = there.at[:, 1 : 1 + visual.shape[1]].min(rearrange(seen["shown"], "(b v) n -> b (v n)", b=there.shape[0]))
    valid = jnp.concatenate([there, mask[:, 1:]], axis=1)
    seen |= {"context": context, "prompt": prompt, "prompt_mask": mask}
    return jnp.concatenate([context, prompt[:, 1:]], axis=1), valid, seen

  def pool(self, prompt: Float[Array, "b t D"], mask: Bool[Array, "b t"]) -> Float[Array, "b D"]:
    """The pooled instruction behind FiLM (Eq. 6): mean embedding of the prompt, `<s>` … 29871, and of `</s>`.

    Differs from the paper: the release pools the language model's input embeddings, template words included.
    """
    stop = self.llm.embed_tokens(jnp.full((prompt.shape[0], 1), STOP))
    words = jnp.concatenate([prompt, stop], axis=1).astype(jnp.float32)
    keep = jnp.pad(mask | (self.film_pool == "all"), ((0, 0), (0, 1)), constant_values=True)[..., None]
    return (words * keep).sum(axis=1) / keep.sum(axis=1)

  def normalize(self, images: Array) -> dict[str, Float[Array, "b v h w 3"]]:
    """RGB bytes → each encoder's own pixels."""
    return {name: vit.normalize(images) for name, vit in self._encoders().items()}

  def see(
    self, pixels: dict, sentence: Sentence, train: bool = False, part: tuple | None = None
  ) -> tuple[Float[Array, "b n D"], dict]:
    """Pixels of all views → the visual tokens of the language model, view after view, and intermediates."""
    v = next(iter(pixels.values())).shape[1]
    seen = self.encode(pixels, sentence.condition)
    if self.text is not None:
      seen["words"] = sentence.words
    kept, cues = {}, {}
    for name in self._encoders():
      for pruner, encoded in self._pruners(name, seen):
        words = None
        if pruner.reads_words:
          words = self._words(pruner.name, sentence, v)
          if train:
            words = words.replace(noise=noise(self.make_rng("noise"), encoded.patches, words.states, v, part))
        pruned = pruner.prune(encoded, words)
        kept[f"{name}_{pruner.keeps}"] = pruned.tokens
        cues |= {} if pruned.cues is None else {name: pruned.cues}
        seen |= {f"{name}_{key}": x for key, x in pruned.info.items()}
      if not self.pruners[name]:
        kept[f"{name}_patches"] = seen[f"{name}_patches"]
    seen |= kept
    mixes = self.sparse_fuser.how == "mixture"
    pooled = repeat(self.pool(sentence.prompt, sentence.prompt_mask), "b D -> (b v) D", v=v) if mixes else None
    seen["views"] = self.sparse_fuser(kept, cues, pooled)
    if shown := [x.shown for x in seen.values() if isinstance(x, IDPruned) and x.shown is not None]:
      fused = functools.reduce(jnp.logical_or, shown)  # behind the cues, one for each kept patch
      seen["shown"] = jnp.pad(fused, ((0, 0), (seen["views"].shape[1] - fused.shape[1], 0)), constant_values=True)
    if self.compressor is not None:
      words = (repeat(x, "b t ... -> (b v) t ...", v=v) for x in (sentence.prompt, sentence.prompt_mask))
      seen["views"] = self.compressor(seen["views"], *words)
    return rearrange(seen["views"], "(b v) n d -> b (v n) d", v=v), seen

  def encode(self, pixels: dict, condition: Mapping[str, Array]) -> dict[str, Array]:
    """Both encoders, block by block, the Dense-Fuser's exchanges in between (Eq. 7-8); tokens by name, f[(b v) n d]."""
    encoders = self._encoders()
    v = next(iter(pixels.values())).shape[1]
    condition = {name: repeat(x, "b ... -> (b v) ...", v=v) for name, x in condition.items()}
    x, done, attention, seen = {}, dict.fromkeys(encoders, 0), {}, {}
    for name, vit in encoders.items():
      queries = [pruner.queries() for pruner in self.pruners[name] if pruner.num_queries]
      queries = jnp.concatenate(queries, axis=1) if queries else None
      x[name] = vit.embed(rearrange(pixels[name], "b v h w c -> (b v) h w c"), queries)

    def run(name, stop):
      x[name], weights = encoders[name].run(x[name], done[name], stop, condition.get(name))
      done[name], attention[name] = stop, weights if weights is not None else attention.get(name)

    for level, pair in enumerate(self.dense_fuser.pairs if self.dense_fuser is not None else ()):
      for name, block in zip(encoders, pair):
        run(name, block + 1)
      updates = self.dense_fuser(level, *(vit.patches(x[name]) for name, vit in encoders.items()))
      for (name, vit), update in zip(encoders.items(), updates):
        x[name] = x[name].at[:, vit.num_prefix : vit.num_prefix + vit.num_patches].add(update)
        seen[f"{name}_after_pair_{level}"] = x[name]
    for name, vit in encoders.items():
      stop, queries = self._blocks(vit), None
      if self._reads_queries_alone(name) and done[name] < stop - 1:
        # The last block runs for the queries, then for all tokens, which costs nothing where nothing reads them.
        run(name, stop - 1)
        queries = vit.tail(x[name], stop - 1, condition.get(name))
      run(name, stop)
      seen[f"{name}_patches"] = vit.patches(x[name])
      if vit.queries:
        seen[f"{name}_queries"] = x[name][:, -vit.queries :] if queries is None else queries
        seen[f"{name}_attention"] = attention[name]
    return seen

  def _blocks(self, vit: ViT) -> int:
    """How many of an encoder's blocks run."""
    return vit.depth if self.vision_layer == "last" else vit.depth - 1

  def _reads_queries_alone(self, name: str) -> bool:
    """Whether an encoder's patches go nowhere behind its last block."""
    return bool(self.pruners[name]) and not any(getattr(p, "reads_patches", True) for p in self.pruners[name])

  def logits(self, observation: Observation, pixels: dict | None = None) -> tuple[Float[Array, "b t vocab"], dict]:
    """Next-token logits at every prompt position (teacher forcing: the prompt holds the action tokens too)."""
    x, valid, seen = self.read(observation, False, pixels)
    block = jnp.zeros(valid.shape[1], bool)
    allowed, positions = masks.attention_mask(valid, block, "causal"), masks.positions(valid)
    hidden, _ = self.llm(x, positions, allowed)
    context = seen["context"].shape[1]
    states = jnp.concatenate([hidden[:, :1], hidden[:, context:]], axis=1)
    return self.llm.logits(states), seen | dict(sequence=x, valid=valid, allowed=allowed, hidden=hidden)

  def generate(
    self,
    observation: Observation,
    pixels: dict | None = None,
    tokens: int | None = None,
    sentence: Sentence | None = None,
  ) -> Spoken:
    """Action tokens behind the prompt, a whole chunk's unless `tokens` says how many; see models/speech.py."""
    x, valid, seen = self.read(observation, False, pixels, None, sentence)
    last = _last(seen["context"], seen["prompt_mask"])
    whole = self.chunk * self.spoken_dims + (self.codec is not None)  # and </s>, of FAST's tokens
    return speak(self, x, valid, last, whole if tokens is None else tokens, self.decoding, self.codec)

  @property
  def spoken_vocab(self) -> int:
    """Ids of the language model's tokenizer (32000); OpenVLA's actions are the last 256 of them."""
    return self.llm.vocab - EXTRA_ROWS

  def _encoders(self) -> dict[str, ViT]:
    return {name: vit for name, vit in (("dino", self.dino), ("siglip", self.siglip)) if vit is not None}

  def pruner(self, encoder: str, kind: str) -> nn.Module | None:
    """An encoder's pruner of one kind of pruner.KINDS, or None."""
    return next((x for x in self.pruners.get(encoder, ()) if isinstance(x, KINDS[kind])), None)

  @property
  def prunes_by_instruction(self) -> bool:
    """Whether the instruction decides which patches of an image are kept."""
    return any(self.pruner(encoder, "id") is not None for encoder in self.pruners)

  @property
  def remembers(self) -> bool:
    """Whether an answer depends on earlier queries of the episode."""
    return self.decoder_pruner is not None and self.decoder_pruner.history is not None

  def parts(self) -> dict[str, nn.Module]:
    """The parts that this model has, by the name that their parameters go under."""
    fields = {x.name: getattr(self, x.name) for x in dataclasses.fields(self) if x.name != "parent"}
    return {name: x for name, x in fields.items() if isinstance(x, nn.Module)} | {
      pruner.name: pruner for pruners in self.pruners.values() for pruner in pruners
    }

  def _pruners(self, name: str, seen: Mapping[str, Array]) -> Iterator[tuple[nn.Module, Encoded]]:
    """An encoder's pruners, each with the patches and its own of the queries."""
    patches, start = seen[f"{name}_patches"], 0
    for pruner in self.pruners[name]:
      own, start = slice(start, start + pruner.num_queries), start + pruner.num_queries
      queries = (seen[f"{name}_queries"][:, own], seen[f"{name}_attention"][:, :, own]) if pruner.num_queries else ()
      yield pruner, Encoded(patches, *queries)

  @nn.nowrap
  def _words(self, pruner: str, sentence: Sentence, v: int) -> Words:
    """The instruction as one pruner reads it, repeated for each view."""
    found = Words(sentence.words, sentence.words_mask, projected=sentence.projected.get(pruner), stop=sentence.stop)
    return jax.tree.map(lambda x: repeat(x, "b m ... -> (b v) m ...", v=v), found)

  @nn.nowrap
  def _check(self, observation: Observation) -> None:
    views, width = observation.images.shape[1], None if observation.proprio is None else observation.proprio.shape[-1]
    if views != self.num_views:
      raise ValueError(
        f"observation: got {views} views, expected {self.num_views} (model.num_views); pass the views the model was "
        "trained with, in its order."
      )
    if width != self.proprio_dim:
      raise ValueError(
        f"observation: got proprioception of width {width}, expected {self.proprio_dim} (model.proprio_dim); "
        "use the config of this robot, or retrain."
      )


def _last(context: Float[Array, "b c D"], prompt_mask: Bool[Array, "b t"]) -> Int[Array, " b"]:
  """Position of each prompt's last real token (29871); `context` is what precedes the prompt's second token."""
  return context.shape[1] + prompt_mask.sum(axis=-1) - 2


def build(config: Any) -> SemanticVLA:
  """A model from a mapping (dict, ConfigDict) of fields of DEFAULTS: the one place that decides which parts exist.

  Raises:
    ValueError: a field that does not exist, or a value that no model can be built from (checks.check).
  """
  c = resolve(config)
  checks.check(c)
  sizes, dtype = c["variant"], jnp.dtype(c["dtype"])
  pruners = FrozenDict((name, _encoder_pruners(c, name)) for name in c["encoders"])
  uses_text = any(pruner.reads_words for own in pruners.values() for pruner in own)
  width = sizes["llm"]["width"]
  return SemanticVLA(
    **{name: _encoder(c, name, pruners.get(name), dtype) for name in ("dino", "siglip")},
    pruners=pruners,
    text=TextEncoder(**sizes["text"], scan=c["scan_encoders"], dtype=dtype) if uses_text else None,
    dense_fuser=fuser.from_config(c, dtype),
    sparse_fuser=SparseFuser(width, how=c["sparse_fuser"], dtype=dtype),
    compressor=compressor.from_config(c["compressor"], dtype),
    proprio_projector=None if c["proprio_dim"] is None else MLP((width, width), dtype=dtype),
    llm=llama.from_config(c, dtype),
    coupler=coupler.from_config(c, width, dtype),
    film=tuple(name for name in c["encoders"] if name in c["film"]),
    film_pool=c["film_pool"],
    vision_layer=c["vision_layer"],
    mask=c["mask"],
    shift=c["coupler"] != "paper",
    chunk=c["chunk"],
    num_views=c["num_views"],
    proprio_dim=c["proprio_dim"],
    optional_views=tuple(c["optional_views"]),
    decoder_pruner=decoder_pruner.from_config(c["decoder_pruner"]),
    spoken_dims=c["action_dim"],
    decoding=c["decoding"],
    codec=fast.from_config(c),
    cue_stop=tuple(c["cue_stop"]),
  )


def _encoder(c: Mapping[str, Any], name: str, pruners: tuple[nn.Module, ...] | None, dtype: Any) -> ViT | None:
  if pruners is None:
    return None
  own = dict(gelu="erf", mean=DINO_MEAN, std=DINO_STD) if name == "dino" else dict(gelu=c["siglip_gelu"])
  sizes = c["variant"]
  how = dict(queries=sum(pruner.num_queries for pruner in pruners), multiple=c["token_multiple"], dtype=dtype)
  how |= dict(remat=bool(c["remat"]), scan=c["scan_encoders"], fused=c["fused"], kernel=c["attention"])
  return ViT(sizes["image"], sizes["patch"], **sizes[name], **own, **how)


def _encoder_pruners(c: Mapping[str, Any], name: str) -> tuple[nn.Module, ...]:
  chosen = [(kind, KINDS[kind]) for kind in kinds(c[f"{name}_pruner"])]
  return tuple(of.from_config(c, c["variant"][name]["width"], f"{name}_{kind}_pruner") for kind, of in chosen)


def dummy_observation(model: SemanticVLA, batch: int = 1, prompt: int = 8) -> Observation:
  """An observation of zeros that fits `model`, for shape inference."""
  size = next(vit.image for vit in (model.dino, model.siglip) if vit is not None)
  words = None if model.text is None else (batch, model.text.positions)
  return Observation(
    images=jnp.zeros((batch, model.num_views, size, size, 3), jnp.uint8),
    proprio=None if model.proprio_dim is None else jnp.zeros((batch, model.proprio_dim), jnp.float32),
    prompt=jnp.ones((batch, prompt), jnp.int32),
    prompt_mask=jnp.ones((batch, prompt), bool),
    instruction=None if words is None else jnp.zeros(words, jnp.int32),
    instruction_mask=None if words is None else jnp.ones(words, bool),
  )


def abstract_params(model: SemanticVLA | nn.Module, observation: Observation) -> dict:
  """The parameter tree as shapes, without memory, at any size; in seconds, and at once for an equal model."""
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), observation)
  try:
    hash(model)
  except TypeError:  # a part with an array or the like for a field
    return unfreeze(_abstract_params.__wrapped__(model, shapes))
  return unfreeze(_abstract_params(model, shapes))


@functools.lru_cache(maxsize=64)
def _abstract_params(model: nn.Module, observation: Observation) -> FrozenDict:
  rngs = {"params": jax.random.key(0), "noise": jax.random.key(1)}
  return freeze(jax.eval_shape(functools.partial(model.init, rngs), observation)["params"])
