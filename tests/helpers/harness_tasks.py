"""Local tasks of lm-evaluation-harness: YAML files, and JSON lines of sums and words."""

import json
from pathlib import Path

WORDS = 'list dict set int float str bytes tuple none true map zip'.split()
METRICS = 'metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n'
TASKS = {
  'choose': r"""
output_type: multiple_choice
description: "Sums.\n"
doc_to_text: "{{a}} and {{b}} is"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
  'shots': r"""
output_type: multiple_choice
description: "Sums:\n"
num_fewshot: 2
fewshot_delimiter: "; "
doc_to_text: "{{a}} {{b}}"
doc_to_choice: choices
doc_to_target: gold
"""
  + METRICS,
  'tested': r"""
output_type: multiple_choice
description: "Sums:\n"
num_fewshot: 2
fewshot_split: test
fewshot_delimiter: "; "
doc_to_text: "{{a}} {{b}}"
doc_to_choice: choices
doc_to_target: gold
"""
  + METRICS,
  'first': r"""
output_type: multiple_choice
description: "About {{word}}:\n"
num_fewshot: 3
fewshot_split: validation
fewshot_config: {sampler: first_n, doc_to_text: "Solved: {{a}}", doc_to_target: "{{word}}!", doc_to_choice: null}
doc_to_text: "{{a}} {{b}}"
doc_to_choice: choices
doc_to_target: gold
"""
  + METRICS,
  'blanks': r"""
output_type: multiple_choice
num_fewshot: 2
doc_to_text: "{{[gold, 0] | max % 2}}"
doc_to_choice: "{{[a ~ ' is', b ~ ' is']}}"
doc_to_target: "{{word}}"
"""
  + METRICS,
  'continue': 'output_type: loglikelihood\ndoc_to_text: "{{a}} {{b}}"\ndoc_to_target: " {{word}}"\n' + METRICS,
  'blank': r"""
output_type: multiple_choice
doc_to_text: "{{[gold, 0] | max % 2}}"
doc_to_choice: "{{[a ~ ' is', b ~ ' is']}}"
doc_to_target: "{{word}}"
"""
  + METRICS,
  'whole': r"""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
  'write': r"""
output_type: generate_until
doc_to_text: "{{a}} {{b}}"
doc_to_target: word
generation_kwargs: {until: ["\n", "e"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
}


def write(folder: Path, names: tuple[str, ...] = tuple(TASKS), documents: int = 24) -> Path:
  """Writes the tasks, whose names begin with own_, and their data; returns the folder."""
  folder.mkdir(exist_ok=True)
  for number, split in enumerate(('train', 'validation', 'test')):
    lines = []
    for i in range(documents):
      a, b = i + 100 * number, 2 * i + 1
      word = WORDS[(i * 5 + number) % len(WORDS)]
      choices = [str(a + b), f'{word} {i}', WORDS[i % 7]]
      gold = i % 3 if i != 1 else -1  # one label is hidden
      record = {'a': str(a), 'b': str(b), 'word': word, 'choices': choices, 'gold': gold}
      lines.append(json.dumps(record | {'text': f'{word} is not {a}; ' * 8}) + '\n')
    (folder / f'{split}.jsonl').write_text(''.join(lines))
  files = ''.join(f'    {split}: {folder / split}.jsonl\n' for split in ('train', 'validation', 'test'))
  for name in names:
    splits = 'training_split: train\nvalidation_split: validation\n' if name != 'write' else ''
    (folder / f'{name}.yaml').write_text(
      f'task: own_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n{files}{splits}test_split: test\n'
      + TASKS[name]
    )
  return folder
