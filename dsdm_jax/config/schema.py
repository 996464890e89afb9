"""Every key of a run: name, type, default, unit, bounds, one sentence. docs/keys.md is made from this.

A string in `Annotated` is the unit. Upper bounds are far above what a machine can hold or run: they catch slips.
`relations` has the rules for several keys.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from ml_collections import ConfigDict, FieldReference
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from dsdm_jax.config import values as v
from dsdm_jax.config.methods import METHODS
from dsdm_jax.config.values import must

Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Steps = Annotated[int, Ge(0), Le(2**31 - 1), 'steps']
Bytes = Annotated[int, Ge(0), Le(v.MAX_BYTES), 'bytes']
PageBytes = Annotated[int, Ge(10_000), Le(2**31 - 1), 'bytes']
Rows = Annotated[int, Ge(0), Le(v.MAX_ROWS), 'rows']
BatchRows = Annotated[int, Ge(0), Le(2**24), 'rows']
Batch = Annotated[BatchRows, Ge(1)]
Count = Annotated[int, Ge(0), Le(10**9)]
Few = Annotated[int, Ge(0), Le(10_000)]
Draws = Annotated[int, Ge(0), Le(10**7), 'draws']
Models = Annotated[int, Ge(0), Le(100_000), 'models']
Passes = Annotated[int, Ge(1), Le(v.MAX_PASSES), 'passes']
FloatPasses = Annotated[float, Ge(0), Le(v.MAX_PASSES), 'passes']
Tokens = Annotated[int, Ge(1), Le(2**24), 'tokens']
Width = Annotated[int, Ge(1), Le(2**22)]
Devices = Annotated[int, Le(10**6), 'devices']
Processes = Annotated[int, Ge(0), Le(10**6), 'processes']
Seconds = Annotated[int, Ge(1), Le(30 * 86_400), 'seconds']
Real = Annotated[float, Ge(0), Le(1e30)]
PositiveReal = Annotated[Real, Gt(0)]
Factor = Annotated[float, Ge(0), Le(v.MAX_FACTOR)]
Share = Annotated[float, Gt(0), Le(1)]  # of something that may be whole
OpenShare = Annotated[float, Gt(0), Lt(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
FloatType = Literal['float32', 'bfloat16']
Texts = tuple[str, ...]
FunctionName = Annotated[
  str, must(v.is_function_name, "must be 'package.module:function' with a module that Python finds from here")
]
Regex = Annotated[str, must(v.is_regex, 'must be a regular expression')]
Delimiter = Annotated[
  str,
  must(lambda x: len(x) <= 1_000, 'must have at most 1,000 characters'),
  must(
    lambda x: not re.search(r'\\n|\\t(?![a-z])', x),
    r"must have line breaks and tabs as they are, not as \n and \t; in a shell they are $'\n' and $'\t'",
  ),
]
ShortNames = must(
  lambda x: all(map(v.is_short_name, x)),
  f'must have names (of a path: the file name without .jsonl) of at most {v.LONGEST_NAME} bytes',
)
OneLine = Annotated[str, must(lambda x: '\n' not in x, 'must be one line')]


def key(default: Any, sentence: str) -> Any:
  return Field(default, description=sentence)


class Section(BaseModel, strict=True, allow_inf_nan=False, extra='forbid'):
  """Keys of one part of a run."""


class Mesh(Section):
  """replicas × data × model is the number of devices. Batches are split over replicas × data."""

  replicas: Annotated[Devices, Ge(0)] = key(
    0, 'Copies of the weights, each within a TPU slice, with sums of gradients between them; 0 makes one a slice.'
  )
  data: Annotated[Devices, must(lambda n: n == -1 or n >= 1, 'must be at least 1, or -1 for all that are left')] = key(
    -1, 'Devices that share the weights of a replica and split its batch (FSDP); -1 takes all that are left.'
  )
  model: Annotated[Devices, Ge(1)] = key(1, 'Devices that split each matrix product (tensor parallelism).')


class Distributed(Section):
  """Several processes that form one run (docs/pretraining.md): start the same command on each, with its own number."""

  coordinator: Annotated[
    str,
    must(
      lambda x: x in ('', 'auto') or v.is_address(x),
      "must be 'host:port' of process 0 (a port is at most 65,535), auto, or '' for one process",
    ),
  ] = key('', "'host:port' of process 0, auto (TPU pods, Slurm, Open MPI), or '' for one process.")
  processes: Annotated[Processes, Ge(1)] = key(1, 'Number of processes; with auto, the number that must connect.')
  process: Processes = key(0, 'Number of this process, from 0; ignored with auto.')
  heartbeat_seconds: Annotated[Seconds, Ge(5)] = key(40, 'A process that is silent for so long counts as lost.')
  start_seconds: Seconds = key(300, 'Time for all processes to connect.')


class Pool(Section):
  """Candidate pool: documents → tokens → rows of exactly `length` tokens (docs/pools.md)."""

  sources: Annotated[
    Texts,
    must(
      lambda x: bool(x) and len(x) == len(set(x)) and all(map(v.is_source, x)),
      f"must be one or more of 'installed_packages', 'KIND:GLOB' with a kind of {', '.join(v.SOURCE_KINDS)}, or "
      "'package.module:function' with a module that Python finds from here, each once",
    ),
  ] = key(('installed_packages',), "Sources of documents, one text each: 'kind:glob or name | option=value'.")
  kinds: Annotated[
    tuple[Literal[v.KINDS], ...],  # type: ignore[valid-type]
    must(lambda x: 0 < len(x) == len(set(x)), 'must name at least one, each once'),
  ] = key(v.KINDS, 'Kinds of file that installed_packages reads.')
  max_bytes: Bytes = key(1_100_000, 'UTF-8 text in the pool, divided over the sources by weight; 0 takes all.')
  max_document_bytes: Annotated[Bytes, Le(16 * 2**20)] = key(
    0, 'Longer documents are cut here, in UTF-8 and at the end of a character; 0 cuts none.'
  )
  on_error: Literal['fail', 'skip'] = key('fail', 'Bad input stops the run, or is skipped, counted and listed.')
  drop_duplicates: bool = key(True, 'Keep only the first of documents with identical bytes.')
  length: Annotated[Tokens, Ge(8)] = key(128, 'L, the tokens of one row.')
  packed: bool = key(True, 'Join documents and cut rows; False gives each a row of its own, cut or padded.')
  vocabulary: Annotated[
    str,
    must(
      lambda x: x in ('train', 'bytes') or x.endswith(('.model', '.json')),
      "must be 'train', 'bytes', or the path of a SentencePiece .model or a tokenizer.json",
    ),
  ] = key('train', 'train (SentencePiece unigram on the pool), bytes, or a SentencePiece .model or tokenizer.json.')
  vocab_size: Annotated[int, Ge(300), Le(10**7), 'pieces'] = key(1_024, 'Size of a trained vocabulary.')
  end_piece: OneLine = key('', "Piece of a tokenizer.json that ends a document; '' takes that of its configuration.")
  max_unknown_share: Annotated[float, Ge(0), Le(1)] = key(
    0.001, 'Maximum share of unknown pieces in a sample of the pool, encoded with a given vocabulary.'
  )
  plant_targets: Count = key(0, 'Control: target examples of each task that are added verbatim as documents.')


class Host(Section):
  """Resources of this machine. Results do not depend on them."""

  workers: Annotated[int, Ge(0), Le(10_000), 'processes'] = key(0, 'Prepare the pool; 0 takes one for each core.')
  beam: Annotated[
    str, must(lambda x: not x or x.startswith('--'), "must be options such as '--runner=DirectRunner', or empty")
  ] = key('', "Options of an Apache Beam pipeline that prepares the pool instead; '' for none.")


class Logs(Section):
  """What a run prints and where its curves go. Results do not depend on it."""

  level: Literal['warning', 'info', 'debug'] = key('info', 'warning prints no progress, debug all details of stages.')
  to: Annotated[
    tuple[Literal['tensorboard', 'wandb'], ...], must(lambda x: len(x) == len(set(x)), 'must be distinct')
  ] = key(('tensorboard',), 'Loggers of training curves; wandb is a package of its own; () for none.')


class Targets(Section):
  """Target tasks: what the trained model should be good at."""

  tasks: Annotated[
    Texts,
    must(
      lambda x: all(t in (*v.TASKS, *v.BENCHMARKS) or v.is_jsonl(t) or v.is_harness(t) for t in x),
      f'must be one or more of {", ".join((*v.TASKS, *v.BENCHMARKS))}, paths that end in .jsonl, or lm_eval:TASK',
    ),
    must(lambda x: 0 < len(x) == len(set(x)), 'must name at least one, each once'),
    must(
      v.have_distinct_names,
      "must have different names (a path: the file name without .jsonl) of letters, digits, '.', '-' and single '_', "
      "and none may be 'mix'",
    ),
    ShortNames,
  ] = key(
    v.TASKS[:3], 'Built-in tasks, names of benchmarks (docs/benchmarks.md), paths of JSONL files, or lm_eval:TASK.'
  )
  folder: Annotated[
    str,
    must(
      lambda x: '\n' not in x and x == x.strip() and (not x or all(part.strip() for part in x.split(' | '))),
      "must be one line that does not begin or end with white space; several places are joined by ' | '",
    ),
  ] = key(
    '',
    "Folder of benchmark and lm_eval files, tfds or tfds:DATA_DIR; with several ('a | b') the first that has one wins.",
  )
  file_shots: Few = key(0, 'Solved examples before each question of a task given by its path.')
  file_delimiter: Delimiter = key(' ', "Between context and answer of such a task; '' for nothing.")
  max_examples: Annotated[Count, Ge(1)] = key(256, 'Maximum examples of each task and split.')
  holdout_share: OpenShare = key(0.5, "Share of a task's documents that the datamodel does not see.")
  long_prompts: Literal['cut', 'refuse'] = key(
    'cut', 'A prompt of a target that is too long without shots loses its beginning, or the run stops.'
  )
  breadth: Factor = key(
    0.0, "Weight of one more task, breadth: documents held out of the pool; the other tasks' is 1. 0 holds out none."
  )
  seed: Seed = key(0, 'Seed of generated tasks, of the split, and of the documents that breadth holds out.')


class Leakage(Section):
  """Rows that hold text of a target or benchmark, which no selection takes."""

  guard: bool = key(True, 'Find documents of the pool that contain target text, and list them.')
  mask: bool = key(True, 'No selection takes a row of these documents.')
  ngram: Annotated[Few, Ge(2)] = key(12, 'Consecutive words that count as the same text.')
  common: Count = key(10, 'A passage that more documents share is a common phrase, and no leak; 0 for none.')
  benchmarks: Annotated[
    Texts,
    must(
      lambda x: all(b in (v.EVALUATED, *v.BENCHMARKS) or v.is_jsonl(b) or v.is_harness(b) for b in x),
      f"must be '{v.EVALUATED}', names of {', '.join(v.BENCHMARKS)}, paths that end in .jsonl, or lm_eval:TASK",
    ),
  ] = key((v.EVALUATED,), 'Benchmarks to look for: names, files, lm_eval:TASK, or evaluated (evaluation.tasks).')


class Model(Section):
  """Decoder language model. Use your own with `factory`; it may have more keys and other texts."""

  factory: FunctionName = key(
    'dsdm_jax.lm.decoder:build', 'Builds the nnx.Module (tokens_BL → logits_BLV): (config, vocab_size, length, rngs).'
  )
  size: Literal['', '125M', '356M', '760M', '1.3B'] = key('', "The paper's layers, width, heads, and what follows.")
  weights: Annotated[str, must(lambda x: x == x.strip(), 'must be a folder, or empty')] = key(
    '', "Folder of a Hugging Face model (docs/pretraining.md), which sets shape and initial weights; '' for none."
  )
  layers: Annotated[int, Ge(1), Le(100_000)] = key(2, 'Number of blocks.')
  width: Width = key(64, 'D, a multiple of heads unless head_size is set.')
  heads: Width = key(2, 'Query heads.')
  kv_heads: Width = key(2, 'Key and value heads; divides heads; fewer than heads is grouped-query attention.')
  head_size: Annotated[int, Ge(0), Le(2**22)] = key(0, 'K, the width of a head; 0 takes width / heads.')
  mlp_width: Width = key(256, 'F, the width of the MLP.')
  positions: Literal['learned', 'rope'] = key('learned', 'Position embeddings.')
  rotary_share: Share = key(1.0, 'Share of a head that rope rotates; an even number of its dimensions.')
  rotary_base: Annotated[Real, Gt(1)] = key(10_000.0, "Base of rope's frequencies.")
  rotary_scaling: Annotated[
    tuple[float, ...],
    must(
      v.is_rotary_scaling,
      'must be empty, a factor above 1, or that and three numbers above 0 of which the first is less than the second',
    ),
  ] = key((), "(factor,), or Llama 3.1's (factor, low, high, length); see lm/decoder.py.")
  rotary_global_every: Annotated[int, Ge(1), Le(100_000), 'layers'] = key(
    1, 'Only every n-th layer has rotary_base and rotary_scaling; 6 in Gemma 3.'
  )
  rotary_local_base: Annotated[Real, Gt(1)] = key(
    10_000.0, 'Base of the other layers, whose frequencies are not scaled.'
  )
  parallel_residual: bool = key(False, 'Attention and MLP read the same input, as in GPT-NeoX.')
  norm: Literal['layernorm', 'rmsnorm'] = key('layernorm', 'Normalization.')
  norm_place: Literal['pre', 'post', 'both'] = key(
    'pre', 'Norms before attention and MLP, after them (OLMo-2), or both (Gemma 2 and 3).'
  )
  norm_epsilon: Annotated[float, Ge(0), Le(1)] = key(0.0, '0 takes 1e-5 for layernorm and 1e-6 for rmsnorm.')
  qk_norm: Literal['none', 'head', 'all'] = key(
    'none', 'Norms of queries and keys: of each head (Qwen3, Gemma 3), or of all heads together (OLMo-2).'
  )
  mlp: Literal['gelu', 'gelu_exact', 'swiglu', 'geglu'] = key('gelu', 'Activation; gelu is the tanh form of GPT-2.')
  attention_cap: Real = key(0.0, 'c > 0 replaces attention scores s by c·tanh(s/c), as in Gemma 2.')
  logit_cap: Real = key(0.0, 'The same for logits.')
  tied_embeddings: bool = key(True, 'One table for input embedding and output logits.')
  embedding_scale: PositiveReal = key(1.0, 'Factor of the input embedding; √width in Gemma.')
  init_std: PositiveReal = key(0.02, 'Initial weights and embeddings; narrow models learn faster near 1/√width.')
  bias: bool = key(True, 'Biases in linear layers and layer norms.')
  qkv_bias: bool = key(False, 'Biases of queries, keys and values where bias is False, as in Qwen2.')
  scan_layers: bool = key(False, 'Compile one block for all layers: compiles faster, runs the same.')
  remat: bool = key(False, "Recompute each block's activations in the backward pass.")
  attention: Literal['xla', 'fused'] = key(
    'xla', 'fused: no L×L array (cuDNN on GPUs, in bfloat16; splash on TPUs); no forward mode or second derivative.'
  )
  compute_dtype: FloatType = key('float32', 'Parameters and losses stay float32.')


class Training(Section):
  """One training run, with the values of the paper where the scale allows."""

  batch_size: Batch = key(32, 'Examples per step over all devices; a multiple of mesh.replicas × mesh.data.')
  learning_rate: PositiveReal = key(3e-3, 'Peak, after the warm-up.')
  schedule: Literal['cosine', 'linear', 'wsd', 'constant'] = key(
    'cosine', 'cosine is the paper; wsd stays at the peak, then decays linearly over decay_share; all warm up.'
  )
  decay_share: Share = key(0.2, 'Share of all steps in which wsd decays.')
  final_learning_rate: Annotated[float, Ge(0), Le(1)] = key(0.1, 'Share of the peak at the end of the schedule.')
  warmup_steps: Steps = key(20, 'Linear from zero.')
  optimizer: Annotated[
    str, must(v.is_optimizer_name, "must name one of optax, or 'package.module:function' that Python finds from here")
  ] = key('adamw', "adamw (with the adam_ keys), any optimizer of optax, such as contrib.muon, or 'module:function'.")
  optimizer_arguments: Annotated[
    str, must(v.are_arguments, "must be keyword arguments with plain values, such as 'b1=0.9, nesterov=True'")
  ] = key('', "Arguments of an optimizer other than adamw, as in Python: 'b1=0.95, b2=0.98'.")
  weight_decay: Real = key(4e-4, 'Decoupled; matrices only.')
  adam_b1: BelowOne = key(0.9, 'Decay of the first moments.')
  adam_b2: BelowOne = key(0.95, 'Decay of the second moments.')
  adam_eps: PositiveReal = key(1e-8, 'Added to the root of the second moments.')
  adam_eps_root: Real = key(0.0, 'Added under the root; above 0 the training is smoother in its data.')
  mu_dtype: FloatType = key('float32', 'Storage of the first moments; they are computed in float32.')
  nu_dtype: FloatType = key('float32', 'Storage of the second moments; they are computed in float32.')
  gradient_clip: Real = key(1.0, 'Maximum global norm; 0 turns clipping off.')
  z_loss: Real = key(0.0, 'Weight of the mean squared logsumexp of the logits; 1e-4 in PaLM.')
  microbatches: BatchRows = key(
    0, 'Parts of a batch whose gradients are added; 0: one, or on a CPU as many as keep their logits in its caches.'
  )
  save_every_steps: Steps = key(200, 'Save a checkpoint to resume from; 0 saves only the end.')
  save_every_minutes: Annotated[Real, Le(10**6), 'minutes'] = key(0.0, 'Also save when the last is older; 0 for never.')
  keep_checkpoints: Annotated[Few, Ge(1)] = key(2, 'Newest checkpoints to keep; with 1, a torn one leaves none.')
  keep_every_steps: Steps = key(0, 'Also keep checkpoints whose step this divides; 0 for none.')
  keep_every_hours: Annotated[Real, Le(20_000), 'hours'] = key(0.0, 'Also keep one for each span of time; 0 for none.')
  log_every_steps: Annotated[Steps, Ge(1)] = key(10, 'Log the loss.')
  evaluate_every_steps: Steps = key(0, 'Loss on rows that are not trained on; a multiple of log_every_steps.')
  evaluate_rows: Annotated[Rows, Ge(1)] = key(256, 'Maximum rows of this evaluation, in whole batches.')
  profile_steps: Steps = key(0, 'Steps to profile, from the third on, into WORKDIR/tensorboard/<run>.')


class Proxies(Section):
  """Small models on random subsets. Their gradients make the datamodel."""

  seed: Seed = key(0, 'Other proxies (subsets, initialization, order) on the same pool, for the same root seed.')
  count: Annotated[Models, Ge(1)] = key(2, 'Number of proxies.')
  checkpoints: Annotated[Few, Ge(1)] = key(1, 'Evenly spaced states of each, with the last; scores are averages.')
  subset_share: Share = key(0.5, "Share of the pool's rows, drawn separately for each proxy.")
  epochs: FloatPasses = key(2.0, 'Passes over the subset; 0 takes proxies.model.weights as they are.')
  model: Model = Model()
  train: Training = Training()


class Features(Section):
  """Projected per-example gradients of the output function."""

  output_fn: FunctionName = key(
    'dsdm_jax.lm.outputs:margin', 'Its gradient is projected: (logits_LV, tokens_L, weights_L) → scalar.'
  )
  projection: Literal['ekfac', 'two_sided', 'dense'] = key(
    'ekfac', 'ekfac: none, curvature by EK-FAC; or features by projection of each layer, or of the whole gradient.'
  )
  dimension: Annotated[int, Ge(1), Le(2**24), 'columns'] = key(
    2_048, 'Requested J; two_sided takes the nearest a×b per layer below it.'
  )
  basis: Literal['random', 'eigenvectors'] = key(
    'random', "eigenvectors (two_sided): of the second moments of each layer's inputs and output gradients."
  )
  basis_rows: Annotated[Rows, Ge(1)] = key(128, 'First rows of the pool, for the eigenvectors or for ekfac.')
  layers: Regex = key('.*', 'Regex over paths of parameters (two_sided); kernel$ takes linear layers only.')
  mode: Literal['store', 'stream', 'jvp'] = key(
    'store', 'Store features, recompute them for each pass, or score by derivatives (dense); ekfac has none to store.'
  )
  gram_rows: Rows = key(0, 'First rows of the shuffled pool, for the Gram matrix of jvp; 0 takes all.')
  precondition: Literal['none', 'adam'] = key('none', "adam: divide by the root of the proxy's second moments.")
  batch_size: Batch = key(32, 'Examples per step over all devices, rounded up to what these share evenly.')
  microbatch: BatchRows = key(
    0, 'Examples whose gradients are held at once (dense, jvp, ekfac); 0: the batch, or of scores what caches hold.'
  )
  shard_rows: Batch = key(1_024, 'Rows of one shard, the unit of work, storage and resume.')
  jobs: Annotated[Processes, Ge(1)] = key(1, 'Processes that share the stage, each with --stage=features.')
  job: Processes = key(0, 'Number of this process, from 0; below jobs.')
  store_dtype: Literal['float32', 'bfloat16', 'int8'] = key('bfloat16', 'int8 has a scale for each row and layer.')


class Datamodel(Section):
  """Scores φ(x)·(ΦᵀΦ/N + λI)⁻¹ mean target φ, averaged over proxies."""

  damping: PositiveReal = key(0.1, 'λ relative to tr(ΦᵀΦ/N)/J; with ekfac to the mean eigenvalue of each parameter.')
  damping_rule: Literal['fixed', 'auto'] = key(
    'fixed', 'auto: the damping, of 1/100 to 100 times the fixed one, that best predicts held-out proxies; needs 3.'
  )
  gram: Literal['auto', 'full', 'layers', 'joint'] = key(
    'auto', 'layers: a block per layer (two_sided); joint: columns of all proxies; auto: layers for two_sided, or full.'
  )
  target_share: BelowOne = key(0.0, "Share of the Gram matrix's trace from the targets' own examples.")
  unit_norm: bool = key(False, 'Normalize the features of rows and target examples.')
  recentre: bool = key(False, "Divide each inverse by its mean absolute entry, as TRAK's code does; changes scales.")
  q: bool = key(False, "Multiply scores by 1 − the row's mean token probability (TRAK's Q); one more forward pass.")
  average: Literal['auto', 'all', 'unseen'] = key(
    'auto', 'unseen: over proxies not trained on the row; auto: where own rows shift by over 0.1 standard deviations.'
  )
  groups: Annotated[Count, Ge(1)] = key(8, "Groups of each target's examples with scores; at most one a document.")
  examples: Count = key(8, 'First examples of each task whose best and worst rows are stored for the report; 0: none.')
  bootstrap: Annotated[Draws, must(lambda n: n == 0 or n >= 2, 'must be 0 for none, or at least 2')] = key(
    64, "Resamples of each target's documents, for intervals; 0 for none."
  )
  confidence: OpenShare = key(0.95, 'Confidence level of these intervals.')
  mix: Literal['mean', 'zscore', 'rank'] = key(
    'zscore', 'How scores of several tasks become one; mean is the paper, where the task with the widest scores wins.'
  )


class Validation(Section):
  """Are the scores true? Runs only with --stage=validation; the learning algorithm is that of the proxies."""

  rows: Annotated[Rows, Ge(20)] = key(2_048, 'Rows of the pool whose subsets the models train on.')
  target_examples: Annotated[Count, Ge(1)] = key(64, 'Maximum examples of each task.')
  epochs: Annotated[FloatPasses, Gt(0)] = key(3.0, 'Passes over the rows.')
  seeds: Annotated[Models, Ge(1)] = key(2, 'Initializations and orders to average over; 2 or more give a ceiling.')
  halves: Models = key(40, 'Random subsets of half the rows.')
  stratified: Models = key(12, 'Subsets of half the rows, with a different share of each source.')
  drops: Annotated[
    tuple[float, ...], must(lambda x: all(0 < share < 0.5 for share in x), 'must be shares above 0 and below 0.5')
  ] = key((0.02, 0.05, 0.1), 'Shares of the rows to drop: those of highest score, of lowest, and random ones.')
  proxies: Annotated[Models, Ge(2)] = key(4, 'Models from which the variants of the datamodel are made.')
  models_at_once: Annotated[Models, Ge(1)] = key(4, 'Models trained in one program, by vmap.')
  variants: Regex = key('.*', 'Regex over the names of predictors; the reference is always included.')
  oracle: bool = key(True, 'Also compute derivatives through training.')
  least_eps_root: Real = key(1e-8, 'Minimum adam_eps_root here; at 0, derivatives through training are infinite.')
  smooth_eps_root: PositiveReal = key(1e-6, 'adam_eps_root of the second, metasmooth setting.')
  smooth_batch_size: Batch = key(64, 'Batch size of the metasmooth setting.')
  resamples: Annotated[Draws, Ge(20)] = key(200, 'Resamples of subsets and target documents, for intervals.')


class Selection(Section):
  """Which rows each arm trains on (docs/selection.md)."""

  methods: Annotated[
    Texts,
    must(
      v.are_methods,
      f"must be one or more of {', '.join(METHODS)}, or 'package.module:function', with names that differ",
    ),
  ] = key(
    ('dsdm', 'random', 'random_one_epoch', 'bottom'), "Arms: names of methods, or your own 'package.module:function'."
  )
  targets: Annotated[Texts, must(lambda x: len(x) == len(set(x)), 'must name each target once')] = key(
    ('mix',), "Each is a task, mix (all tasks), or tasks joined by '+'; () is one, all tasks of now joined by '+'."
  )
  unit: Literal['row', 'document'] = key('row', 'What is selected: rows, or whole documents of as many tokens.')
  examples: Annotated[Rows, Ge(1)] = key(1_024, 'k, the rows of a targeted selection.')
  epochs: Passes = key(4, "Passes over these; examples × epochs is every arm's budget.")
  repeat_cap: Passes = key(16, 'Maximum visits of one row in a whole training; at least epochs.')
  document_cap: Rows = key(0, 'Maximum rows of one document in a ranked selection; 0 for no limit.')
  source_cap: Share = key(1.0, 'Maximum share of a ranked selection from one source; 1 for no limit.')
  temperature: PositiveReal = key(1.0, 'dsdm_gumbel, dsdm_boltzmann: in standard deviations of the scores.')
  diversity: Real = key(1.0, 'dsdm_greedy, dsdm_clusters: standard deviations that full redundancy costs.')
  clusters: Count = key(0, 'dsdm_clusters, semdedup: clusters of k-means; 0 takes the square root of the rows.')
  duplicate_keep: Annotated[float, Ge(0), Le(1)] = key(
    0.2, "semdedup: share of the rows to keep, at least an arm's; 0 keeps all below duplicate_similarity."
  )
  duplicate_similarity: Share = key(0.8, 'semdedup: cosine above which rows are near duplicates.')
  ngrams: Literal['words', 'tokens'] = key('words', 'words of the text, or stored token ids (several times faster).')
  ngram_buckets: Annotated[int, Ge(0), Le(2**31), must(lambda n: n != 1, 'must be 0, or at least 2')] = key(
    0, "Hash buckets of words and bigrams; 0 takes each method's own, such as dsir's published 10,000."
  )
  classifier_rows: Annotated[Rows, Ge(1)] = key(50_000, 'classifier: maximum rows of the pool to learn from.')
  conditional_steps: Annotated[Steps, Ge(1)] = key(
    100, "color_filter: most steps of the first proxy on a task's examples; held-out ones choose steps and rate."
  )
  distill_rows: Annotated[Rows, Ge(50)] = key(
    20_000, 'dsdm_distilled: rows whose scores it learns from and is tested on.'
  )
  prefilter: Annotated[
    str,
    must(
      lambda x: not x or v.Prefilter.parse(x) is not None,
      "must be empty, or like 'lsa 3': one of " + ', '.join(v.PREFILTERS) + ' and a number of at least 1',
    ),
  ] = key('', "Only rows kept by a method without a model have scores: 'lsa 3' keeps 3 × examples for each target.")
  imported: Annotated[
    str, must(lambda x: not x or x.endswith(('.npy', '.parquet', '.pt')), 'must end in .npy, .parquet or .pt')
  ] = key('', 'imported: file with one score for each row; higher is better.')


class Mixture(Section):
  """One more arm, mixture, of several selections at fixed rates and the same budget."""

  parts: Annotated[
    Texts,
    must(
      v.are_parts,
      "must be parts like 'dsdm@docs rate=2 epochs=4 cap=8' or 'random rows=500', each method and target once, with "
      f'numbers above 0 and at most {v.MAX_FACTOR:,} (rows: {v.MAX_ROWS:,})',
    ),
  ] = key(
    (), "() for none, or 'method@target rate=R epochs=E cap=C' (rows=K in place of epochs); see docs/selection.md."
  )
  when_empty: Literal['drop', 'repeat', 'refuse'] = key(
    'drop', 'A part that reaches its cap: the others take its place, it is repeated, or the run stops.'
  )


class Pretraining(Section):
  """One model for each arm and seed."""

  max_epochs: Annotated[FloatPasses, must(lambda n: n == 0 or n >= 1, 'must be 0 for any number, or at least 1')] = key(
    0.0, "Maximum passes over an arm's rows; 0 for no limit, 1 forbids repeats."
  )
  models_at_once: Annotated[Models, Ge(1)] = key(1, 'Models trained together on one device that one would leave idle.')
  seeds: Annotated[Models, Ge(1)] = key(3, 'Models of each arm; useful intervals need at least 3.')
  train: Training = Training()


class Ladder(Section):
  """Models on random rows at several amounts of compute, which express results as compute."""

  rungs: Annotated[
    Texts,
    must(v.are_rungs, f'must be empty, or two or more different numbers above 0 and at most {v.MAX_FACTOR:,} as texts'),
  ] = key(
    (), "Compute relative to a run of an arm, such as ('0.5', '1', '2'); each is spent at the best size and rate found."
  )
  step: Annotated[float, Ge(1), Le(1_000)] = key(
    2.0, 'Factor between the sizes, and between the rates, that are tried at each rung; 1 tries none.'
  )
  seeds: Annotated[Models, Ge(1)] = key(3, 'Models of each rung, at the size and rate of the first.')


class Evaluation(Section):
  """Questions for the trained models, and the statistics of their answers (docs/evaluation.md)."""

  tasks: Annotated[
    Texts, must(lambda x: 0 < len(x) == len(set(x)), 'must name at least one task, each once'), ShortNames
  ] = key(
    ('targets',), "targets (the run's own, both splits), benchmarks in targets.folder, JSONL files, or lm_eval:TASK."
  )
  max_items: Annotated[Count, must(lambda n: n == 0 or n >= 2, 'must be 0 for all, or at least 2')] = key(
    0, 'Maximum items of each benchmark, spread evenly over its file; 0 takes all.'
  )
  file_shots: Few = key(0, 'Solved examples before each question of a file given by its path.')
  file_delimiter: Delimiter = key(' ', "Between context and answer in such a file; '' for nothing.")
  long_prompts: Literal['cut', 'refuse'] = key(
    'cut', 'A prompt of a benchmark that is too long without shots loses its beginning, or the run stops.'
  )
  generate_tokens: Tokens = key(16, 'Maximum length of a generated answer; below pool.length.')
  begin_with_end_mark: bool = key(
    True, 'Without a begin mark, put an end mark before each prompt, as before each document of the pool.'
  )
  checkpoints: Annotated[
    Texts,
    must(
      lambda x: all(v.is_named_folder(text) for text in x) and len({text.split('=')[0] for text in x}) == len(x),
      "must be texts 'name=folder', each name once, of letters, digits, '.', '-' and '_'",
    ),
    must(
      lambda x: all(v.is_short_name(text.split('=')[0]) for text in x),
      f'must have names of at most {v.LONGEST_NAME} bytes',
    ),
  ] = key((), "Other models to compare: 'name=folder', an Orbax checkpoint of `model` with the pool's vocabulary.")
  ngram_tokens: Annotated[int, Ge(0), Le(10**12), 'tokens'] = key(
    30_000_000, "Tokens of an arm's rows that the n-gram reference lines count, at most; 0 leaves the lines out."
  )
  bootstrap: Annotated[Draws, Ge(100)] = key(10_000, 'Bootstrap over items, where each arm has one model.')
  selection_uses: Annotated[int, Ge(1), Le(10**6)] = key(1, 'Trainings that share the cost of a selection.')
  batch_size: Batch = key(64, 'Examples per step over all devices; a multiple of mesh.replicas × mesh.data.')
  paired_seeds: bool = key(
    True, 'Compare models of one seed: right where arms correlate over seeds above 0.6, as in short trainings.'
  )
  confidence: OpenShare = key(0.95, 'Confidence level of intervals.')


class Report(Section):
  examples: Annotated[Few, Ge(1)] = key(10, 'Best and worst rows shown for each target.')
  explorer_rows: Annotated[int, Ge(100), Le(10**7), 'rows'] = key(100_000, 'Maximum in the explorer (docs/report.md).')
  explorer_bytes: PageBytes = key(10_000_000, 'Maximum size of their text in the page; it is cut to fit.')


class Plan(Section):
  """--stage=plan: what the run takes on TPUs that are not present (docs/scale.md). Other stages ignore these keys."""

  topology: Annotated[
    str, must(v.is_topology, 'must be CHIP:AxB or CHIP:AxBxC, with numbers of at most four digits')
  ] = key('v5e:2x4', 'Chip (v4, v5e, v5p, v6e or tpu7x) and shape of the slice.')
  slices: Annotated[Few, Ge(1)] = key(1, 'Slices of this shape, which the data-center network connects.')
  rows: Rows = key(0, 'N to plan for; 0 guesses from pool.max_bytes at four bytes a token.')
  price_per_chip_hour: Annotated[Factor, 'USD'] = key(0.0, '0 leaves out the price.')
  multiplier: Annotated[Factor, Gt(0)] = key(2.0, 'Expected gross compute multiplier.')
  calibration: Annotated[str, must(lambda x: not x or x.endswith('.json'), 'must end in .json, or be empty')] = key(
    '', 'File by `bench device`: measured seconds for each modelled one; empty: none.'
  )


class Config(Section):
  seed: Seed = key(0, 'Root of every named random stream.')
  mesh: Mesh = Mesh()
  distributed: Distributed = Distributed()
  pool: Pool = Pool()
  host: Host = Host()
  log: Logs = Logs()
  targets: Targets = Targets()
  leakage: Leakage = Leakage()
  model: Model = Model()
  proxies: Proxies = Proxies()
  features: Features = Features()
  datamodel: Datamodel = Datamodel()
  validation: Validation = Validation()
  selection: Selection = Selection()
  mixture: Mixture = Mixture()
  pretraining: Pretraining = Pretraining()
  ladder: Ladder = Ladder()
  evaluation: Evaluation = Evaluation()
  report: Report = Report()
  plan: Plan = Plan()


class Keys(ConfigDict):
  """A ConfigDict whose integer keys also accept whole floats, such as 1e6."""

  def __setitem__(self, name: str, value: Any) -> None:
    if isinstance(value, float) and value.is_integer() and name in self and type(self[name]) is int:
      value = int(value)
    super().__setitem__(name, value)


def config_dict(section: type[Section] = Config) -> ConfigDict:
  """The keys of `section` with their defaults. `proxies.model` follows `model` until it is set."""
  keys = Keys()
  for name, field in section.model_fields.items():
    keys[name] = config_dict(type(field.default)) if isinstance(field.default, Section) else field.default
  if section is Config:
    # References from the start: get_oneway_ref walks through all values to make one of a value.
    keys.model = Keys({name: FieldReference(value) for name, value in keys.model.items()})
    keys.proxies.model = Keys({name: keys.model.get_oneway_ref(name) for name in keys.model})
  return keys


def fields(section: type[Section] = Config, prefix: str = '') -> Iterator[tuple[str, FieldInfo]]:
  """(dotted key, its field) for every key, in order."""
  for name, field in section.model_fields.items():
    if isinstance(field.default, Section):
      yield from fields(type(field.default), f'{prefix}{name}.')
    else:
      yield prefix + name, field


FIELDS = dict(fields())
