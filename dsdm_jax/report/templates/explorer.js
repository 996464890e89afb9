'use strict';
// The explorer: unpacks the data of report/explorer.py, and lets the reader search, sort and compare. All text is set
// with textContent, and nothing is loaded from the network.
(() => {
  const $ = (id) => document.getElementById(id);
  const ROW = 58; // px, the height of a line of the list, as in style.css
  const MOST = 100000; // rows of one downloaded file
  const count = new Intl.NumberFormat('en').format;
  let data = null; // header, and the columns by name
  let texts = null; // of each row
  let lowered = null; // the same in lower case, computed at the first search
  let shown = new Uint32Array(0); // positions of the rows that match, in the selected order
  let open = -1; // place in `shown` of the row in the dialog, −1 for a row that was not opened from the list
  const orders = new Map();

  async function unpack(id) {
    const node = $(id);
    const raw = atob(node.textContent.trim());
    node.remove();
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function parse(bytes) {
    const size = new DataView(bytes.buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + size)));
    const kinds = { f8: Float64Array, u4: Uint32Array, i2: Int16Array, u2: Uint16Array, u1: Uint8Array };
    const column = {};
    let at = 4 + size;
    for (const [name, kind] of header.columns) {
      column[name] = new kinds[kind](bytes.buffer, at, header.rows);
      at += column[name].byteLength;
    }
    const place = new Map();
    column.row.forEach((row, i) => place.set(row, i));
    return { ...header, column, place };
  }

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const option = (value, text) => Object.assign(make('option', '', text), { value });
  const signed = (x, digits = 2) => {
    const text = Math.abs(x).toFixed(digits);
    return Number(text) === 0 ? text : (x > 0 ? '+' : '−') + text;
  };
  const percent = (x) => (x > 0 && x < 0.0005 ? '< 0.1\u00a0%' : `${(100 * x).toFixed(1)}\u00a0%`);
  const target = () => data.targets[$('x-target').selectedIndex];
  const score = (t, i) => data.column[`score ${t.id}`][i] * t.step;
  /** Half the length of the interval of a score, or null where there is none. */
  const reach = (t, i) => {
    const codes = data.column[`reach ${t.id}`];
    return codes ? (codes[i] ? t.reach * 1000 ** ((codes[i] - 255) / 254) : 0) : null;
  };
  const documentOf = (i) => data.documents[data.column.document[i]];

  /** Share of the pool's rows with a lower score, from the quantiles that the header tells. */
  function percentile(t, z) {
    const q = t.quantiles;
    let low = 0, high = q.length - 1;
    if (z <= q[0]) return 1 / data.pool;
    if (z >= q[high]) return 1 - 1 / data.pool;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (q[middle] <= z) low = middle; else high = middle;
    }
    return (low + (z - q[low]) / (q[high] - q[low] || 1)) / (q.length - 1);
  }

  /** Positions of all rows in an order, made once for each. Ties go to the lower row. */
  function order(key) {
    if (!orders.has(key)) {
      const all = Uint32Array.from({ length: data.rows }, (_, i) => i);
      const column = data.column;
      if (key.startsWith('sure ')) {
        const t = data.targets.find((each) => `sure ${each.id}` === key);
        column[key] = Float32Array.from(all, (i) => score(t, i) - (reach(t, i) || 0));
      }
      const by = {
        row: () => 0,
        source: (a, b) => column.source[a] - column.source[b],
        document: (a, b) => column.document[a] - column.document[b],
        text: (a, b) => (texts[a] < texts[b] ? -1 : texts[a] > texts[b] ? 1 : 0),
      }[key] || ((a, b) => column[key][b] - column[key][a]);
      if (key === 'document') { // rows are sorted by document, and within a document by position
        orders.set(key, all.sort((a, b) => by(a, b) || a - b));
      } else {
        orders.set(key, all.sort((a, b) => by(a, b) || column.row[a] - column.row[b]));
      }
    }
    return orders.get(key);
  }

  function relation() {
    const a = data.column[`arm ${$('x-a').value}`], b = data.column[`arm ${$('x-b').value}`];
    return {
      all: () => true,
      a: (i) => a[i] > 0,
      'not-a': (i) => !a[i],
      both: (i) => a[i] > 0 && b[i] > 0,
      'a-not-b': (i) => a[i] > 0 && !b[i],
      'b-not-a': (i) => b[i] > 0 && !a[i],
      neither: (i) => !a[i] && !b[i],
    }[$('x-relation').value];
  }

  function update() {
    const query = $('x-search').value.trim().toLowerCase();
    if (query && texts && !lowered) lowered = texts.map((text) => text.toLowerCase());
    let found = null; // documents whose names match
    if (query) found = data.documents.map((name) => name.toLowerCase().includes(query));
    const source = $('x-source').value, chosen = relation(), column = data.column;
    const key = $('x-sort').value;
    const sorted = order(key === 'high' || key === 'low' ? `score ${target().id}` : key === 'sure' ? `sure ${target().id}` : key);
    const kept = new Uint32Array(data.rows);
    let n = 0;
    for (let k = 0; k < sorted.length; k++) {
      const i = sorted[key === 'low' ? sorted.length - 1 - k : k];
      if (source !== '' && column.source[i] !== Number(source)) continue;
      if (!chosen(i)) continue;
      if (query && !found[column.document[i]] && !(lowered && lowered[i].includes(query))) continue;
      kept[n++] = i;
    }
    shown = kept.subarray(0, n);
    const two = ['both', 'a-not-b', 'b-not-a', 'neither'].includes($('x-relation').value);
    $('x-a').hidden = $('x-relation').value === 'all';
    $('x-b').hidden = !two;
    summarise();
    $('x-rows').style.height = `${n * ROW}px`;
    $('x-list').scrollTop = 0;
    paint(true);
  }

  /** What the matching rows are like, beside the whole pool. */
  function summarise() {
    const t = target(), n = shown.length;
    const counts = new Array(data.groups.length).fill(0), pool = new Array(data.groups.length).fill(0);
    let sum = 0;
    for (const i of shown) { counts[data.sources[data.column.source[i]].group]++; sum += score(t, i); }
    data.sources.forEach((source, s) => { pool[source.group] += data.pool_sources[s]; });
    $('x-count').textContent = n
      ? `${count(n)} of ${count(data.rows)} rows, mean score ${signed(sum / n)} for ${t.id === 'mix' ? 'all targets' : t.name}`
      : 'No row matches.';
    for (const [id, parts, total] of [['x-mix', counts, n], ['x-mix-pool', pool, data.pool]]) {
      $(id).replaceChildren(...parts.map((part, g) => {
        const bar = make('i');
        bar.style.width = `${total ? (100 * part) / total : 0}%`;
        bar.style.background = `var(--${data.groups[g].colour})`;
        bar.title = `${data.groups[g].name}: ${total ? percent(part / total) : '–'}`;
        return bar;
      }));
    }
    $('x-legend').replaceChildren(...data.groups.map((group, g) => {
      const item = make('li');
      const dot = make('i');
      dot.style.background = `var(--${group.colour})`;
      const share = n ? percent(counts[g] / n) : '–';
      item.append(dot, `${group.name} ${share} (pool ${percent(pool[g] / data.pool)})`);
      return item;
    }));
    for (const button of $('x-files').querySelectorAll('button')) button.disabled = !n || n > MOST;
    $('x-files-note').textContent = n > MOST ? `A file has at most ${count(MOST)} rows; dsdm export writes any number.`
      : data.characters ? 'Text is cut in this page, so files have none; dsdm export writes it.' : '';
  }

  /** Rows as records: where they are from, scores in standard deviations, how often each arm selected them, text. */
  function* records(places) {
    for (const i of places) {
      const record = { row: data.column.row[i], source: data.sources[data.column.source[i]].name, document: documentOf(i) };
      for (const t of data.targets) record[`score ${t.id}`] = Number(score(t, i).toFixed(4));
      data.arms.forEach((arm, a) => { record[`selections of ${arm.name}`] = data.column[`arm ${a}`][i]; });
      if (!data.characters) record.text = texts[i];
      yield record;
    }
  }

  /** One cell of a CSV file. Text that begins as a formula gets an apostrophe, so that no spreadsheet runs it. */
  function cell(value) {
    if (typeof value === 'number') return String(value);
    const text = /^(\s*[=+\-@＝＋－＠]|[\t\r\n])/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  /** Gives the reader a file with these rows. */
  function save(places, name, form) {
    const parts = [];
    for (const record of records(places)) {
      if (form === 'jsonl') {
        parts.push(`${JSON.stringify(record)}\n`);
      } else {
        if (!parts.length) parts.push(`${Object.keys(record).map(cell).join(',')}\n`);
        parts.push(`${Object.values(record).map(cell).join(',')}\n`);
      }
    }
    const link = make('a');
    link.href = URL.createObjectURL(new Blob(parts, { type: form === 'csv' ? 'text/csv' : 'application/jsonl' }));
    link.download = `${name}.${form}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  /** Shows the buttons that save files, once there is text. */
  function offer() {
    for (const node of document.querySelectorAll('.x-files')) {
      const arm = node.dataset.arm && data.column[`arm ${node.dataset.arm}`];
      const best = () => order(`score ${target().id}`).filter((i) => arm[i] > 0);
      node.addEventListener('click', (event) => {
        const { form } = event.target.dataset;
        if (form) save(arm ? best() : shown, arm ? node.dataset.name : 'rows', form);
      });
      node.hidden = false;
    }
  }

  const arms = (i) => data.arms.map((arm, a) => [arm, data.column[`arm ${a}`][i]]).filter(([, times]) => times > 0);

  function tags(i) {
    const tag = make('span', 'tag', data.sources[data.column.source[i]].name);
    const nodes = [tag];
    if (data.column.planted[i]) nodes.push(make('span', 'tag', 'planted'));
    return nodes;
  }

  function scoreNode(z) {
    return make('b', z >= 0 ? 'better' : 'worse', signed(z));
  }

  /** A score's interval, as what is added and taken away; nothing where there is none. */
  function reachNode(t, i) {
    const r = reach(t, i);
    return r === null ? [] : [make('small', 'x-reach', `± ${r.toFixed(2)}`)];
  }

  /** The lines that can be seen, and some on either side; those that stay are kept, so that the focus is not lost. */
  function paint(replace) {
    const list = $('x-list'), rows = $('x-rows');
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
    if (replace) rows.replaceChildren();
    const have = new Set();
    for (const node of [...rows.children]) {
      const at = Number(node.dataset.at);
      if (at < first || at >= last) node.remove(); else have.add(at);
    }
    for (let at = first; at < last; at++) if (!have.has(at)) rows.append(line(at));
  }

  function line(at) {
    const i = shown[at];
    const node = make('button', 'x-row');
    node.type = 'button';
    node.dataset.at = at;
    node.style.top = `${at * ROW}px`;
    const head = make('span', 'x-head');
    head.append(scoreNode(score(target(), i)), ...reachNode(target(), i), ...tags(i));
    for (const [arm] of arms(i)) head.append(make('span', 'x-arm', arm.name));
    head.append(make('span', 'id', documentOf(i)));
    node.append(head, make('span', 'x-text', texts ? texts[i].slice(0, 220).replace(/\s+/g, ' ') : '…'));
    node.addEventListener('click', () => { open = at; show(i); });
    return node;
  }

  /** One row with all that is known of it. */
  function show(i) {
    const dialog = $('x-dialog');
    $('x-title').textContent = `Row ${count(data.column.row[i])}`;
    const meta = $('x-meta');
    meta.replaceChildren(...tags(i), make('span', 'id', documentOf(i)));
    const taken = arms(i).map(([arm, times]) =>
      arm.selections > 1 ? `${arm.name} (${times} of ${arm.selections} draws)` : arm.name);
    $('x-taken').textContent = taken.length ? `Selected by: ${taken.join(', ')}.` : 'Selected by no arm.';
    $('x-scores').replaceChildren(...data.targets.map((t) => {
      const z = score(t, i), share = percentile(t, z);
      const row = make('tr');
      row.append(make('th', '', t.name));
      const value = make('td', 'n');
      value.append(scoreNode(z), ' ', ...reachNode(t, i));
      const bar = make('td', 'x-bar'), track = make('div');
      const r = reach(t, i);
      if (r !== null) {
        const low = percentile(t, z - r), band = make('span');
        band.style.left = `${100 * low}%`;
        band.style.width = `${100 * (percentile(t, z + r) - low)}%`;
        track.append(band);
      }
      const mark = make('i');
      mark.style.left = `${100 * share}%`;
      track.append(mark);
      bar.append(track);
      row.append(value, bar, make('td', 'n', share > 0.5 ? `top ${percent(1 - share)}` : `bottom ${percent(share)}`));
      return row;
    }));
    $('x-body').textContent = texts ? texts[i] : 'The text is still being unpacked.';
    $('x-cut').hidden = !(data.characters && texts && texts[i].length >= data.characters);
    $('x-previous').disabled = open <= 0;
    $('x-next').disabled = open < 0 || open >= shown.length - 1;
    if (!dialog.open) dialog.showModal();
  }

  function step(by) {
    if (open < 0 || open + by < 0 || open + by >= shown.length) return;
    open += by;
    const list = $('x-list');
    if (open * ROW < list.scrollTop || (open + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = open * ROW;
    show(shown[open]);
  }

  /** The candidates that one target example asks for most and least. */
  function example() {
    const e = data.examples[$('x-example').value];
    $('x-context').textContent = e.context || '(no context: the whole text is what the model should say)';
    $('x-answer').textContent = e.answer;
    const half = e.rows.length / 2;
    const fill = (id, from, to) => $(id).replaceChildren(...e.rows.slice(from, to).map((row, k) => {
      const i = data.place.get(row);
      const item = make('li'), button = make('button', 'x-candidate');
      button.type = 'button';
      const head = make('span', 'meta');
      head.append(scoreNode(e.scores[from + k]), ...tags(i), make('span', 'id', documentOf(i)));
      button.append(head, make('span', 'x-snippet', texts ? texts[i].slice(0, 400) : '…'));
      button.addEventListener('click', () => { open = -1; show(i); });
      item.append(button);
      return item;
    }));
    fill('x-best', 0, half);
    fill('x-worst', half, e.rows.length);
  }

  function listExamples() {
    const task = $('x-task').value;
    const named = data.examples.map((e, k) => [e, k]).filter(([e]) => e.target === task);
    $('x-example').replaceChildren(...named.map(([e, k], n) =>
      option(k, `${n + 1}: ${(e.context || e.answer).trim().replace(/\s+/g, ' ').slice(-60)}`)));
    example();
  }

  function fill() {
    const names = new Map(data.targets.map((t) => [t.id, t.name]));
    $('x-target').replaceChildren(...data.targets.map((t) => option(t.id, t.name)));
    $('x-source').replaceChildren(option('', 'every source'), ...data.sources.map((s, i) => option(i, s.name)));
    for (const id of ['x-a', 'x-b']) {
      $(id).replaceChildren(...data.arms.map((arm, a) => option(a, `${arm.name} (${count(arm.rows)} rows)`)));
    }
    if (data.targets.some((t) => t.reach)) {
      $('x-unsure').hidden = false;
    } else {
      $('x-sure').remove();
    }
    $('x-b').selectedIndex = Math.min(1, data.arms.length - 1);
    $('x-what').textContent = data.rows === data.pool
      ? `All ${count(data.pool)} rows of the pool are here.`
      : `${count(data.rows)} of the pool’s ${count(data.pool)} rows are here: the best and the worst of each target, what `
        + 'the arms selected (as far as there is room), and others at even distances.';
    if (data.characters) $('x-what').textContent += ` Their text is cut after ${data.characters} characters.`;
    if (data.examples.length) {
      const tasks = [...new Set(data.examples.map((e) => e.target))];
      $('x-task').replaceChildren(...tasks.map((task) => option(task, names.get(task) || task)));
      $('one').hidden = false;
    }
  }

  function listen() {
    let waiting = 0;
    $('x-search').addEventListener('input', () => {
      clearTimeout(waiting);
      waiting = setTimeout(update, 150);
    });
    for (const id of ['x-target', 'x-source', 'x-relation', 'x-a', 'x-b', 'x-sort']) $(id).addEventListener('change', update);
    let asked = false;
    const soon = () => {
      if (!asked) requestAnimationFrame(() => { asked = false; paint(false); });
      asked = true;
    };
    $('x-list').addEventListener('scroll', soon, { passive: true });
    addEventListener('resize', soon);
    $('x-task').addEventListener('change', listExamples);
    $('x-example').addEventListener('change', example);
    $('x-previous').addEventListener('click', () => step(-1));
    $('x-next').addEventListener('click', () => step(1));
    $('x-close').addEventListener('click', () => $('x-dialog').close());
    $('x-dialog').addEventListener('click', (event) => { if (event.target === $('x-dialog')) $('x-dialog').close(); });
    $('x-dialog').addEventListener('keydown', (event) => {
      if (event.key === 'ArrowLeft') step(-1);
      if (event.key === 'ArrowRight') step(1);
    });
  }

  async function start() {
    data = parse(await unpack('x-columns'));
    fill();
    listen();
    $('x-controls').disabled = false;
    update();
    texts = new TextDecoder().decode(await unpack('x-texts')).split('\0');
    update();
    if (data.examples.length) listExamples();
    offer();
    $('explorer').dataset.ready = 'yes';
  }

  if (!('DecompressionStream' in window)) {
    $('x-count').textContent = 'This browser is too old for the explorer; use one of 2023 or later.';
    return;
  }
  // After the page has been painted, since unpacking takes a moment.
  requestAnimationFrame(() => setTimeout(() => start().catch((error) => {
    $('x-count').textContent = `The explorer cannot open its data: ${error.message}`;
    throw error;
  }), 0));
})();
