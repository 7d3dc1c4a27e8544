const colors = 12;
const steps = charts.filter(chart => !chart.bars).flatMap(chart => chart.lines.flatMap(line => line.x));
const lastStep = steps.reduce((most, step) => Math.max(most, step), 1);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- curves

// In a chart of several runs, the legend names each run once, and shows in grey what dashes mean.
function legendTraces(chart) {
  if (!chart.several) return [];
  const silent = {x: [null], y: [null], mode: "lines", hoverinfo: "skip"};
  const runs = new Map(chart.lines.map(line => [line.name, line.color]));
  const kinds = new Map(chart.lines.map(line => [line.kind, line.dash]));
  return [
    ...[...runs].map(([name, color]) => ({...silent, name, legendgroup: name, line: {color: css(`--c${color % colors}`), width: 2}})),
    ...(kinds.size < 2 ? [] : [...kinds].map(([name, dash]) => ({...silent, name, line: {color: css("--soft"), dash, width: 2}}))),
  ];
}

function traces(chart) {
  return chart.lines.flatMap(line => {
    const color = css(`--c${line.color % colors}`);
    if (chart.bars) {
      return [{type: "bar", orientation: "h", x: line.y, y: line.x, name: line.name, marker: {color},
               hovertemplate: "%{x:.3g} s"}];
    }
    const marks = line.x.length < 30 ? "lines+markers" : "lines";
    const trace = {
      x: line.x, y: line.y, name: line.name, mode: chart.stacked ? "lines" : marks,
      line: {color, dash: line.dash, width: 2}, marker: {size: 5}, hovertemplate: "%{y:.4~g}",
    };
    if (chart.several) {
      const kinds = new Set(chart.lines.map(other => other.kind)).size;
      Object.assign(trace, {legendgroup: line.name, showlegend: false, name: line.name + (kinds > 1 ? `, ${line.kind}` : "")});
    }
    if (line.error !== null) {
      trace.error_y = {type: "data", array: line.error, thickness: 1, width: 3, color};
    }
    if (chart.stacked) {
      return [{...trace, stackgroup: "all", line: {color, width: 0.5}, fillcolor: color + "b0"}];
    }
    const silent = {x: line.x, mode: "lines", showlegend: false, hoverinfo: "skip", legendgroup: trace.legendgroup};
    if (line.low !== null) {
      const edge = {...silent, line: {color, width: 0}};
      return [{...edge, y: line.low}, {...edge, y: line.high, fill: "tonexty", fillcolor: color + "30"}, trace];
    }
    if (line.raw === null) return [trace];
    return [{...silent, y: line.raw, line: {color, width: 1}, opacity: 0.3}, trace];
  }).concat(legendTraces(chart));
}

// Rows of a legend, for which the plot leaves room. Names that do not fit in one row stand in columns of equal width.
function legendRows(names, width) {
  const widths = names.map(name => 7 * name.length + 48);
  if (names.length < 2) return 0;
  if (widths.reduce((sum, part) => sum + part) <= width) return 1;
  return Math.ceil(names.length / Math.max(1, Math.floor(width / Math.max(...widths))));
}

function frame(names, width) {
  const rows = legendRows(names, width);
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 12, color: css("--soft")},
    margin: {l: 44, r: 8, t: rows ? 15 + 19 * rows : 12, b: 30}, hovermode: "x unified",
    hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--text")}},
    showlegend: rows > 0,
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal"},
  };
}

const names = lines => lines.filter(line => line.showlegend !== false).map(line => line.name);
const legendNames = chart => names(chart.several ? legendTraces(chart) : chart.lines);
const axis = () => ({gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true});

function layout(chart, width) {
  if (chart.bars) {
    return {...frame(legendNames(chart), width), hovermode: "closest", barmode: "stack", xaxis: {...axis(), title: {text: chart.unit}}, yaxis: {...axis(), autorange: "reversed"}};
  }
  const large = chart.lines.some(line => line.y.some(value => Math.abs(value) >= 1000));
  return {
    ...frame(legendNames(chart), width),
    xaxis: {...axis(), title: {text: "step", standoff: 4}, range: [-0.012 * lastStep, 1.012 * lastStep], hoverformat: "d", unifiedhovertitle: {text: "step %{x}"}},
    yaxis: {...axis(), type: chart.log ? "log" : "linear", rangemode: chart.stacked ? "tozero" : "normal",
            exponentformat: large ? "SI" : "e", nticks: 6},
  };
}

// ---- token figures: traces in plotly's format, with colours that name entries of the page's palette

function themed(value) {
  if (Array.isArray(value)) return value;
  if (value !== null && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part)]));
  }
  if (typeof value !== "string" || !value.startsWith("@")) return value;
  return css(value.startsWith("@c") ? `--c${Number(value.slice(2)) % colors}` : `--${value.slice(1)}`);
}

function figureLayout(figure, width) {
  const themedAxes = Object.fromEntries(
    Object.entries({xaxis: {}, yaxis: {}, ...figure.layout}).map(([key, part]) => [key, /^[xy]axis/.test(key) ? {...axis(), ...part} : part]));
  return {...frame(names(figure.traces), width), ...themedAxes};
}

function plot(id, height, legend, traces, layoutFor) {
  const place = document.getElementById(id), width = place.clientWidth - 52;
  place.style.height = `${height + 19 * Math.max(1, legendRows(legend, width))}px`;
  Plotly.react(id, traces, layoutFor(width), {displayModeBar: false, responsive: true});
}

function draw() {
  charts.forEach((chart, index) =>
    plot(`plot${index}`, 265, legendNames(chart), traces(chart), width => layout(chart, width)));
  figures.forEach((figure, index) =>
    plot(`figure${index}`, figure.height, names(figure.traces), figure.traces.map(themed), width => figureLayout(figure, width)));
}

// ---- light and dark

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  draw();
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const otherTheme = () => document.documentElement.dataset.theme === "dark" ? "light" : "dark";
document.getElementById("theme").addEventListener("click", () => setTheme(otherTheme()));
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
document.addEventListener("keydown", event => {
  const typing = event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey;
  if (event.key === "d" && !typing) setTheme(otherTheme());
});
setTheme(prefersDark.matches ? "dark" : "light");

// ---- responses: all text is inserted as text, never as markup

function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function tokenNode(sample, index) {
  const [filtered, selected] = [sample.marks[index] & 1, sample.marks[index] & 2];
  if (sample.marks[index] & 4) {
    const given = element("span", "token given", sample.texts[index]);
    given.title = "given to the policy, not sampled";
    return given;
  }
  const p = sample.p[index], entropy = sample.entropy[index];
  const node = element("span", `token${selected ? " selected" : ""}${filtered ? " filtered" : ""}`, sample.texts[index]);
  node.style.setProperty("--rare", Math.min(1, -Math.log10(Math.max(p, 1e-4)) / 3).toFixed(3));
  node.title = `p ${p}` + (entropy === null ? "" : `, entropy ${entropy}`) + (selected ? ", selected" : "") +
    (filtered ? ", filtered" : ", kept");
  return node;
}

// The tokens of a word-level vocabulary contain no spaces.
const blanksOf = sample => sample.texts.some(text => /\s/.test(text)) ? "" : " ";

function tokensNode(sample, start, end) {
  const node = element("div", "tokens"), blanks = blanksOf(sample);
  if (start === 0 && sample.earlier) node.append(element("span", "soft", `${sample.earlier} earlier tokens … `));
  for (let index = start; index < end; index++) node.append(tokenNode(sample, index), blanks);
  if (end === sample.texts.length && sample.cut) node.append(element("span", "soft", ` … ${sample.cut} more tokens`));
  return node;
}

// A turn of a conversation, under the name of its speaker.
function turnNode(sample, [role, start], place) {
  const end = place + 1 < sample.turns.length ? sample.turns[place + 1][1] : sample.texts.length;
  const node = element("div", `turn ${role}`);
  node.append(element("div", "role", role), tokensNode(sample, start, end));
  return node;
}

function sampleNode(sample) {
  const node = element("div", `sample${sample.sequence > 1 ? " further" : ""}`), facts = element("div", "facts");
  const part = sample.sequences > 1 ? `, sequence ${sample.sequence} of ${sample.sequences} of rollout ${sample.rollout + 1}` : "";
  facts.append(element("b", `badge ${sample.verdict.replace(" ", "-")}`, sample.verdict),
    ` reward ${sample.reward ?? "none"}, advantage ${sample.advantage}, ${sample.tokens} tokens, ended by ${sample.finish}` + part +
    (sample.answer === null ? "" : `, answer ${sample.answer}`) + (sample.detail ? ` (${sample.detail})` : ""));
  const turns = sample.turns.map((turn, place) => turnNode(sample, turn, place));
  node.append(facts, ...(turns.length ? turns : [tokensNode(sample, 0, sample.texts.length)]));
  return node;
}

function wanted(sample) {
  const verdict = document.getElementById("verdicts").value;
  if (verdict === "truncated") return sample.finish === "length";
  if (verdict === "selected") return sample.marks.some(mark => mark & 2);
  return verdict === "" || sample.verdict === verdict;
}

// The responses of a group that the filter and the search leave. A text in the prompt finds all responses to it.
function chosen(group) {
  const text = document.getElementById("search").value.toLowerCase();
  const inPrompt = group.prompt.toLowerCase().includes(text);
  return group.samples.filter(sample => wanted(sample) && (inPrompt || sample.text.includes(text)));
}

let shown = [];

function showGroup(place) {
  const group = shown[place];
  document.getElementById("group").selectedIndex = place;
  document.getElementById("prompt").textContent = group ? group.prompt : "";
  document.getElementById("label").textContent = group && group.label !== null ? `Label: ${group.label}` : "";
  document.getElementById("samples").replaceChildren(...(group ? chosen(group).map(sampleNode) : []));
}

function filterGroups() {
  const select = document.getElementById("group"), before = shown[select.selectedIndex];
  const several = new Set(responses.map(group => group.run)).size > 1;
  shown = responses.filter(group => chosen(group).length);
  select.replaceChildren(...shown.map(group =>
    element("option", "", `${several ? group.run + ", " : ""}step ${group.step}, ${group.prompt_id}`)));
  const count = shown.reduce((sum, group) => sum + chosen(group).length, 0);
  document.getElementById("found").textContent = `${count} responses in ${shown.length} groups`;
  showGroup(Math.max(0, shown.indexOf(before)));
}

if (responses.length) {
  const select = document.getElementById("group"), viewer = document.getElementById("viewer");
  for (const group of responses) {
    for (const sample of group.samples) sample.text = sample.texts.join(blanksOf(sample)).toLowerCase();
  }
  const move = by => shown.length && showGroup((select.selectedIndex + by + shown.length) % shown.length);
  select.addEventListener("change", () => showGroup(select.selectedIndex));
  document.getElementById("verdicts").addEventListener("change", filterGroups);
  document.getElementById("search").addEventListener("input", filterGroups);
  document.getElementById("previous").addEventListener("click", () => move(-1));
  document.getElementById("next").addEventListener("click", () => move(1));
  viewer.addEventListener("keydown", event => {
    if (event.target.matches("select, input") || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    move(event.key === "ArrowRight" ? 1 : -1);
    event.preventDefault();
  });
  filterGroups();
}
