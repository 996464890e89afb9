"""Every key of a run, with its unit and its constraint. The other configs change a few lines each.

Nothing here is meant to be run as it stands: `configs/quickstart.py` is the place to begin. No number is larger than
`dsdm_jax/config/bounds.py` says, and no text longer than 10,000 characters.
Override any key on the command line: `--config.datamodel.damping=0.03`.
"""

from ml_collections import ConfigDict


def model() -> ConfigDict:
  """Decoder language model. A stranger's model plugs in by `factory`."""
  c = ConfigDict()
  # 'package.module:function'; called as function(model_config, vocab_size, length, rngs),
  # returns an nnx.Module that maps tokens_BL (int32) to logits_BLV.
  c.factory = 'dsdm_jax.lm.decoder:build'
  # '' | 125M | 356M | 760M | 1.3B: the paper's layers, width, heads and (unless they are set) kv_heads and mlp_width
  c.size = ''
  # folder with a GPT-2 or GPT-NeoX (Pythia) of Hugging Face, config.json and safetensors: its shape and its weights in
  # place of an initialisation; '' for none
  c.weights = ''
  c.layers = 2
  c.width = 64  # D; a multiple of heads
  c.heads = 2  # query heads
  c.kv_heads = 2  # key and value heads; divides heads; fewer than heads is grouped-query attention
  c.mlp_width = 256  # F
  c.positions = 'learned'  # learned | rope
  c.rotary_share = 1.0  # of a head's size that rope turns; above 0, at most 1; an even number of it
  c.rotary_base = 10_000.0  # of rope's frequencies; above 1
  c.parallel_residual = False  # attention and MLP read the same input, as in GPT-NeoX
  c.norm = 'layernorm'  # layernorm | rmsnorm
  c.mlp = 'gelu'  # gelu (by tanh, as GPT-2) | gelu_exact | swiglu
  c.tied_embeddings = True  # one table for input embedding and output logits
  c.init_std = 0.02  # of weights and embeddings; narrow models learn faster with more, about 1/√width
  c.bias = True  # biases in linear layers and layer norms
  c.scan_layers = False  # one compiled block for all layers: compiles faster, runs the same
  c.remat = False  # recompute each block's activations in the backward pass
  # xla | fused (a kernel that holds no L × L array: cuDNN on NVIDIA GPUs, in bfloat16; splash on TPUs, where
  # pool.length is a multiple of 128; xla elsewhere; no kernel has a forward mode or a second derivative)
  c.attention = 'xla'
  c.compute_dtype = 'float32'  # float32 | bfloat16; parameters and losses stay float32
  return c


def training() -> ConfigDict:
  """One training run. The paper's values where the scale does not forbid them."""
  c = ConfigDict()
  c.batch_size = 32  # examples per step over all devices; a multiple of mesh.data
  c.learning_rate = 3e-3  # peak, after warm-up
  # cosine (paper) | linear | wsd (at the peak, then linear down over the last decay_share) | constant; all warm up
  c.schedule = 'cosine'
  c.decay_share = 0.2  # of all steps, for wsd; above 0, at most 1
  c.final_learning_rate = 0.1  # fraction of the peak that the schedule ends at; 0 to 1
  c.warmup_steps = 20  # linear from zero
  # adamw (with the adam_ keys) | the name of any optimizer in optax, such as lion or contrib.muon | 'package.module:
  # function'. The learning rate multiplies its update.
  c.optimizer = 'adamw'
  c.optimizer_arguments = ''  # of any other than adamw, as in Python: 'b1=0.95, b2=0.98'
  c.weight_decay = 4e-4  # decoupled; matrices only
  c.adam_b1 = 0.9
  c.adam_b2 = 0.95
  c.adam_eps = 1e-8
  c.adam_eps_root = 0.0  # added to second moments under the root; training is smoother in its data where it is not 0
  c.mu_dtype = 'float32'  # float32 | bfloat16: what first moments are kept in; they are computed in float32
  c.nu_dtype = 'float32'  # float32 | bfloat16: second moments likewise
  c.gradient_clip = 1.0  # global norm; 0 turns it off
  c.z_loss = 0.0  # weight of the mean squared logsumexp of the logits; 1e-4 in PaLM
  c.microbatches = 1  # parts of a batch whose gradients are added up, for memory; batch_size is a multiple of it × data
  c.save_every_steps = 200  # an Orbax checkpoint to resume from; 0 saves only the end
  c.save_every_minutes = 0.0  # and one when the last is older than this; 0 for none
  c.keep_checkpoints = 2  # the newest ones; at least 1. With 1 nothing is left where that one is torn
  c.keep_every_steps = 0  # and each whose step this divides; 0 for none
  c.keep_every_hours = 0.0  # and one for each span of so many hours; 0 for none
  c.log_every_steps = 10
  c.evaluate_every_steps = 0  # loss on rows of the pool that the run does not train on; a multiple of log_every_steps
  c.evaluate_rows = 256  # at most; whole batches
  c.profile_steps = 0  # steps to profile, from the third on, into WORKDIR/tensorboard/<run>
  return c


def get_config() -> ConfigDict:
  c = ConfigDict()
  c.seed = 0  # root of every named random stream; >= 0

  c.mesh = ConfigDict()
  c.mesh.data = -1  # devices that share a batch; -1 takes all that mesh.model leaves
  c.mesh.model = 1  # devices that share weights; data × model = number of devices

  # Several processes as one run (docs/pretraining.md): the same command on each, but for distributed.process.
  c.distributed = ConfigDict()
  c.distributed.coordinator = ''  # '' (one process) | 'host:port' of process 0 | auto (TPU pods, Slurm, Open MPI)
  c.distributed.processes = 1  # how many are started; with auto, how many must find each other
  c.distributed.process = 0  # which of them this is, from 0; not looked at with auto
  c.distributed.heartbeat_seconds = 40  # a process that is not heard of for so long is lost, and ends the others; >= 5
  c.distributed.start_seconds = 300  # for all processes to come together

  # Candidate pool: documents → tokens → rows of exactly `length` tokens.
  c.pool = ConfigDict()
  # Sources, one line each: 'kind:glob or name | option=value', see docs/pools.md.
  # installed_packages | text: | jsonl: | parquet: | hf: | tfds: | seqio: | tokens: | package.module:function
  c.pool.sources = ('installed_packages',)
  c.pool.kinds = ('source', 'docs', 'licences', 'metadata', 'data')  # kinds of file taken from installed_packages
  # UTF-8 bytes of text kept, shared by weight over the sources (installed_packages: evenly over kinds); 0 takes all
  c.pool.max_bytes = 1_100_000
  c.pool.max_document_bytes = 8_192  # a longer document is cut here; bytes of UTF-8; 0 cuts none
  c.pool.on_error = 'fail'  # fail | skip: bad input is an error, or left out, counted and listed
  c.pool.drop_duplicates = True  # keep the first of documents that are the same to the byte
  c.pool.length = 128  # L, tokens of one row
  # train (SentencePiece unigram, on the pool) | bytes | path of a SentencePiece .model or a Hugging Face tokenizer.json
  c.pool.vocabulary = 'train'
  c.pool.vocab_size = 1_024  # of a trained vocabulary; pieces
  c.pool.end_piece = ''  # piece of a tokenizer.json that ends a document; '' takes the first usual one that it has
  c.pool.leakage_guard = True  # look for documents that hold target text, and list them
  c.pool.drop_leaks = True  # and drop them
  c.pool.leakage_ngram = 12  # words in a row that count as the same text
  # Benchmarks that the pool must not hold either: names of the table in data/targets/benchmarks.py, .jsonl files, or
  # 'evaluated', which stands for those of evaluation.tasks.
  c.pool.leakage_benchmarks = ()
  c.pool.plant_targets = 0  # control: this many target examples of each task, verbatim, as further documents

  # What this machine gives; results do not depend on it.
  c.host = ConfigDict()
  c.host.workers = 0  # processes that prepare the pool; 0 takes one for each core
  c.host.beam = ''  # options of an Apache Beam pipeline that prepares the pool instead; see docs/pools.md; '' for none

  # Target tasks: what the trained model should be good at.
  c.targets = ConfigDict()
  # Built-in tasks, names of benchmarks (docs/benchmarks.md), or paths of JSONL files.
  c.targets.tasks = ('docs', 'api_qa', 'cs_algorithms')
  # Folder that holds the benchmarks' files under their names, or 'tfds' or 'tfds:DATA_DIR', or several of these: the
  # first that has a benchmark gives it, 'tfds:data/tfds | data/eval'; '' is the folder that this is started in. The
  # leakage guard and evaluation read it too.
  c.targets.folder = ''
  c.targets.max_examples = 256  # of each task and split
  c.targets.holdout_share = 0.5  # of a task's documents; the rest is what the datamodel sees
  c.targets.seed = 0  # of generated tasks and of the split

  c.model = model()

  # Proxies: small models on random subsets, whose gradients make the datamodel.
  c.proxies = ConfigDict()
  c.proxies.seed = 0  # other proxies (subsets, initialisation, order) on the same pool, for the same root seed; >= 0
  c.proxies.count = 2  # at least 1
  # states of each proxy, at equal distances along its training, the last included, that scores are averaged over;
  # features, store and passes of the datamodel grow with it; at least 1
  c.proxies.checkpoints = 1
  c.proxies.subset_share = 0.5  # of the pool's rows, drawn anew for each proxy
  c.proxies.epochs = 2.0  # passes over the subset; 0 takes proxies.model.weights as they are
  c.proxies.model = ConfigDict({k: c.model.get_oneway_ref(k) for k in c.model})
  c.proxies.train = training()

  # Features: projected per-example gradients of the output function.
  c.features = ConfigDict()
  # 'package.module:function'; function(logits_LV, tokens_L, weights_L) -> scalar of one example,
  # its gradient is what is projected.
  c.features.output_fn = 'dsdm_jax.lm.outputs:margin'
  c.features.projection = 'two_sided'  # two_sided | dense
  c.features.dimension = 2_048  # J wished for; two_sided takes the nearest a×b per layer below it
  # random | eigenvectors (two_sided only: of the second moments of each layer's inputs and output gradients, over the
  # first basis_rows rows of the pool)
  c.features.basis = 'random'
  c.features.basis_rows = 512  # at least 1
  c.features.layers = '.*'  # regex over paths of linear layers (two_sided)
  # store (features kept on disk) | stream (made anew for each pass of the datamodel, nothing kept) | jvp (dense only:
  # made for the Gram matrix of gram_rows, and rows scored by directional derivatives)
  c.features.mode = 'store'
  # first rows of the pool, whose order is random, that the Gram matrix is of in mode jvp; 0 takes all
  c.features.gram_rows = 0
  c.features.precondition = 'none'  # none | adam: gradients divided by the root of the proxy's second moments
  # Examples per step over all devices, and of these whose gradients are held at once (dense, jvp): memory is near
  # microbatch × parameters. Each run takes the least that its devices share evenly and that is no less, so both may
  # differ from start to start; features then differ by rounding.
  c.features.batch_size = 32
  c.features.microbatch = 0  # at most batch_size; 0 for the whole batch
  c.features.shard_rows = 1_024  # rows of one shard: the unit of work, of storage and of resume
  # Several processes may share the stage, each started with --stage=features and its own number: jobs in all, and
  # which of them this is, from 0. The features do not depend on either.
  c.features.jobs = 1  # at least 1
  c.features.job = 0  # below features.jobs
  c.features.store_dtype = 'bfloat16'  # float32 | bfloat16 | int8 (with a scale for each row and layer)

  # Datamodel: scores = φ(x)·(ΦᵀΦ/N + λI)⁻¹ mean target φ, averaged over proxies.
  c.datamodel = ConfigDict()
  c.datamodel.damping = 0.1  # λ relative to tr(ΦᵀΦ/N)/J; > 0
  # fixed | auto: the damping, of 1/100 to 100 times datamodel.damping, that best predicts how held-out proxies differ
  # on the targets; needs three proxies. The fixed one stays where no other is clearly better.
  c.datamodel.damping_rule = 'fixed'
  # full | layers (one block per layer, two_sided only: admits a larger J) | joint (one over the columns of all proxies)
  # | auto: layers for two_sided, full for dense (docs/validation.md has the evidence)
  c.datamodel.gram = 'auto'
  c.datamodel.target_share = 0.0  # share of the Gram's trace that comes from the targets' own examples; 0 to below 1
  c.datamodel.unit_norm = False  # features of rows and of target examples brought to norm one
  c.datamodel.recentre = False  # each inverse divided by its mean absolute entry, as TRAK's code does; changes scales
  # scores times 1 − mean predicted-token probability of the row (TRAK's Q); one more forward pass over the pool
  c.datamodel.q = False
  # all | unseen (only over proxies that did not train on the row) | auto (unseen where proxies shift their own rows by
  # more than 0.1 standard deviations, and by more than chance)
  c.datamodel.average = 'auto'
  c.datamodel.groups = 8  # groups of each target's examples whose scores are kept apart; at most one a document
  c.datamodel.examples = (
    8  # first examples of each task whose own best and worst rows are kept, for the report; 0: none
  )
  c.datamodel.bootstrap = 64  # resamples of each target's documents, for intervals; 0 for none, otherwise at least 2
  c.datamodel.confidence = 0.95  # of these intervals; 0 to 1
  # mean (paper) | zscore | rank: how scores of several tasks become one. Scores of tasks differ in scale, and in a
  # plain mean the widest rules.
  c.datamodel.mix = 'zscore'

  # Validation: are the scores true? Made when asked for by --stage=validation; the learning algorithm is the proxies'.
  c.validation = ConfigDict()
  c.validation.rows = 2_048  # of the pool, that models are trained on subsets of
  c.validation.target_examples = 64  # of each task, at most
  c.validation.epochs = 3.0  # passes over the rows
  c.validation.seeds = 2  # initialisations and orders that the truth is averaged over; 2 or more give a ceiling
  c.validation.halves = 40  # random subsets of half the rows
  c.validation.stratified = 12  # subsets of half the rows, of each source its own share
  c.validation.drops = (0.02, 0.05, 0.1)  # shares of the rows that are dropped: of highest score, of lowest, random
  c.validation.proxies = 4  # models that variants of the datamodel are made from; at least 2
  c.validation.models_at_once = 4  # trained in one program, by vmap
  c.validation.variants = '.*'  # regex over names of predictors; the reference is always there
  c.validation.oracle = True  # derivatives through training, beside the scores
  # adam_eps_root of all models here, where the config's is less: without it derivatives through training are infinite
  c.validation.least_eps_root = 1e-8
  c.validation.smooth_eps_root = 1e-6  # of the second, metasmooth setting
  c.validation.smooth_batch_size = 64  # of the same
  c.validation.resamples = 200  # of subsets and target documents, for intervals

  # Selection: which rows each arm trains on. docs/selection.md says what each method does.
  c.selection = ConfigDict()
  # arms: names of dsdm_jax/selection/, or 'package.module:function' of your own
  c.selection.methods = ('dsdm', 'random', 'random_one_epoch', 'bottom')
  c.selection.targets = ('mix',)  # each a task, 'mix', or tasks joined by '+'
  c.selection.examples = 1_024  # k, rows of a targeted selection
  c.selection.epochs = 4  # passes over them; examples × epochs is every arm's budget
  c.selection.repeat_cap = 16  # visits of one row in a whole training, at most; at least epochs
  c.selection.document_cap = 0  # rows of one document in a ranked selection, at most; 0 for any number
  c.selection.source_cap = 1.0  # share of a ranked selection that one source may give; above 0, 1 for all
  c.selection.temperature = 1.0  # dsdm_gumbel, dsdm_boltzmann: standard deviations of the scores; > 0
  c.selection.diversity = 1.0  # dsdm_greedy, dsdm_clusters: standard deviations that full redundancy costs; >= 0
  c.selection.clusters = 0  # dsdm_clusters, semdedup: of k-means; 0 takes the square root of the rows
  c.selection.duplicate_similarity = 0.8  # semdedup: cosine above which rows are near duplicates; above 0, up to 1
  c.selection.ngrams = 'words'  # words (of the text) | tokens (stored ids, several times faster)
  c.selection.ngram_buckets = 65_536  # that uni- and bigrams are hashed into: classifier, dsir, bm25, dsdm_distilled
  c.selection.classifier_rows = 50_000  # classifier: rows of the pool that it learns from, at most
  c.selection.conditional_steps = 50  # color_filter: steps of the first proxy on a task's examples
  c.selection.conditional_learning_rate = 1e-3  # of these steps, at the peak
  c.selection.distill_rows = 20_000  # dsdm_distilled: rows whose scores it learns from and is told by; at least 50
  c.selection.imported = ''  # imported: file of one score a row (.npy, .parquet, .pt), higher is better

  # Mixture: one more arm, 'mixture', of several selections at fixed rates and the same budget.
  c.mixture = ConfigDict()
  # () for no such arm, or parts 'method@target rate=R epochs=E cap=C': rate relative to the other parts (1); epochs
  # passes over its rows (selection.epochs), or rows=K to say how many it gets; cap passes at most
  # (selection.repeat_cap). A share of random pool is ('dsdm@docs rate=3', 'random epochs=1').
  c.mixture.parts = ()
  # drop (the others share its place, the budget stays) | repeat (another pass, whatever the cap) | refuse
  c.mixture.when_empty = 'drop'

  # Pretraining: one model per arm and seed.
  c.pretraining = ConfigDict()
  # passes over an arm's rows that are allowed; 0 for as many as the budget takes, 1 forbids any repeat
  c.pretraining.max_epochs = 0.0
  c.pretraining.models_at_once = 1  # models trained side by side on one device: pays where one leaves it idle
  c.pretraining.seeds = 3  # models per arm; at least 2, 3 for intervals worth reading
  c.pretraining.train = training()

  # Ladder: models on random rows at several sizes, on which results are read as compute; none without rungs.
  c.ladder = ConfigDict()
  # compute of one run at each rung, in that of an arm's, as texts: ('0.25', '0.5', '1', '2', '4'). Parameters and
  # tokens grow with its root; a pool with fewer rows than a rung takes is gone through again.
  c.ladder.rungs = ()
  c.ladder.seeds = 3  # models per rung

  c.evaluation = ConfigDict()
  # What models are asked: targets (the run's own, both splits), benchmarks by the names of data/targets/benchmarks.py
  # (from targets.folder), paths of JSONL files of LLM-Foundry's shapes.
  c.evaluation.tasks = ('targets',)
  c.evaluation.max_items = 0  # of each benchmark, spread evenly over its file; 0 takes all
  c.evaluation.file_shots = 0  # solved examples before each question of a file given by its path
  c.evaluation.file_delimiter = ' '  # between context and answer in such a file
  c.evaluation.generate_tokens = 16  # of a generated answer, at most; below pool.length
  c.evaluation.begin_with_end_mark = True  # an end mark before each prompt, as before each document of the pool
  # Further models to compare, as 'name=folder' with an Orbax checkpoint of `model` on the pool's vocabulary.
  c.evaluation.checkpoints = ()
  c.evaluation.bootstrap = (
    10_000  # draws of the bootstrap over items, where one model stands for each arm; at least 100
  )
  c.evaluation.selection_uses = 1  # trainings that share the cost of choosing, in the net compute multiplier
  c.evaluation.batch_size = 64  # examples per step over all devices; a multiple of mesh.data
  # Compare models of one seed, which share their initialisation, instead of arms as wholes: right where two random
  # arms correlate over seeds above 0.6, as they do in short trainings (docs/quickstart.md).
  c.evaluation.paired_seeds = True
  c.evaluation.confidence = 0.95  # of intervals; 0 to 1

  c.report = ConfigDict()
  c.report.examples = 10  # best and worst rows shown per target
  c.report.explorer_rows = 100_000  # rows of the pool in the explorer, at most; beyond it a choice, see docs/report.md
  c.report.explorer_bytes = 10_000_000  # of the page that their text may take; it is cut to fit

  # --stage=plan: what the run takes on TPUs that are not there (docs/scale.md). No other stage looks at these.
  c.plan = ConfigDict()
  c.plan.topology = 'v5e:2x4'  # chip (v5e | v5p | v6e) and shape of the slice
  c.plan.rows = 0  # N to plan for; 0 guesses from pool.max_bytes at four bytes a token
  c.plan.price_per_chip_hour = 0.0  # USD; 0 leaves money out
  c.plan.multiplier = 2.0  # gross compute multiplier hoped for: what a model on random data costs for the same quality
  c.plan.calibration = 1.0  # seconds measured for one modelled, once something was measured; > 0
  return c
