const colors = 8;
const steps = charts.filter(chart => !chart.bars).flatMap(chart => chart.lines.flatMap(line => line.x));
const lastStep = steps.reduce((most, step) => Math.max(most, step), 1);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- curves

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
    if (chart.stacked) {
      return [{...trace, stackgroup: "all", line: {color, width: 0.5}, fillcolor: color + "b0"}];
    }
    const silent = {x: line.x, mode: "lines", showlegend: false, hoverinfo: "skip"};
    if (line.low !== null) {
      const edge = {...silent, line: {color, width: 0}};
      return [{...edge, y: line.low}, {...edge, y: line.high, fill: "tonexty", fillcolor: color + "30"}, trace];
    }
    if (line.raw === null) return [trace];
    return [{...silent, y: line.raw, line: {color, width: 1}, opacity: 0.3}, trace];
  });
}

// Names that do not fit in one row are listed below each other, and the plot leaves room for them.
const legendRows = names => names.length < 2 ? 0 : names.join("").length > 70 ? names.length : 1;

function frame(names) {
  const rows = legendRows(names);
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: "system-ui, sans-serif", size: 12, color: css("--soft")},
    margin: {l: 44, r: 8, t: rows ? 15 + 19 * rows : 12, b: 30}, hovermode: "x unified",
    hoverlabel: {bgcolor: css("--card"), bordercolor: css("--line"), font: {color: css("--text")}},
    showlegend: rows > 0,
    legend: {orientation: rows > 1 ? "v" : "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal"},
  };
}

const names = lines => lines.map(line => line.name);
const axis = () => ({gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true});

function layout(chart) {
  if (chart.bars) {
    return {...frame(names(chart.lines)), hovermode: "closest", barmode: "stack", xaxis: axis(), yaxis: {...axis(), autorange: "reversed"}};
  }
  const large = chart.lines.some(line => line.y.some(value => Math.abs(value) >= 1000));
  return {
    ...frame(names(chart.lines)),
    xaxis: {...axis(), range: [-0.012 * lastStep, 1.012 * lastStep], hoverformat: "d", unifiedhovertitle: {text: "step %{x}"}},
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
  return css(value === "@soft" ? "--soft" : `--c${Number(value.slice(2)) % colors}`);
}

function figureLayout(figure) {
  const {xaxis = {}, yaxis = {}, ...rest} = figure.layout;
  return {...frame(names(figure.traces)), ...rest, xaxis: {...axis(), ...xaxis}, yaxis: {...axis(), ...yaxis}};
}

function plot(id, height, lines, traces, layout) {
  document.getElementById(id).style.height = `${height + 19 * Math.max(1, legendRows(names(lines)))}px`;
  Plotly.react(id, traces, layout, {displayModeBar: false, responsive: true});
}

function draw() {
  charts.forEach((chart, index) => plot(`plot${index}`, 251, chart.lines, traces(chart), layout(chart)));
  figures.forEach((figure, index) =>
    plot(`figure${index}`, 320, figure.traces, figure.traces.map(themed), figureLayout(figure)));
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
  const p = sample.p[index], entropy = sample.entropy[index];
  const node = element("span", `token${selected ? " selected" : ""}${filtered ? " filtered" : ""}`, sample.texts[index]);
  node.style.setProperty("--rare", Math.min(1, -Math.log10(Math.max(p, 1e-4)) / 3).toFixed(3));
  node.title = `p ${p}` + (entropy === null ? "" : `, entropy ${entropy}`) + (selected ? ", selected" : "") +
    (filtered ? ", filtered" : ", kept");
  return node;
}

function sampleNode(sample) {
  const node = element("div", "sample"), facts = element("div", "facts"), tokens = element("div", "tokens");
  facts.append(element("b", "", `reward ${sample.reward ?? "none"}`),
    `, advantage ${sample.advantage}, ${sample.texts.length + sample.cut} tokens, ended by ${sample.finish}` +
    (sample.answer === null ? "" : `, answer ${sample.answer}`) + (sample.detail ? ` (${sample.detail})` : ""));
  // The tokens of a word-level vocabulary contain no spaces.
  const blanks = sample.texts.some(text => /\s/.test(text)) ? "" : " ";
  sample.texts.forEach((_, index) => tokens.append(tokenNode(sample, index), blanks));
  if (sample.cut) tokens.append(element("span", "soft", ` … ${sample.cut} more tokens`));
  node.append(facts, tokens);
  return node;
}

function showGroup(index) {
  const group = responses[index];
  document.getElementById("group").selectedIndex = index;
  document.getElementById("prompt").textContent = group.prompt;
  document.getElementById("samples").replaceChildren(...group.samples.map(sampleNode));
}

if (responses.length) {
  const select = document.getElementById("group"), viewer = document.getElementById("viewer");
  const several = new Set(responses.map(group => group.run)).size > 1;
  responses.forEach(group =>
    select.append(element("option", "", `${several ? group.run + ", " : ""}step ${group.step}, ${group.prompt_id}`)));
  const move = by => showGroup((select.selectedIndex + by + responses.length) % responses.length);
  select.addEventListener("change", () => showGroup(select.selectedIndex));
  document.getElementById("previous").addEventListener("click", () => move(-1));
  document.getElementById("next").addEventListener("click", () => move(1));
  viewer.addEventListener("keydown", event => {
    if (event.target === select || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    move(event.key === "ArrowRight" ? 1 : -1);
    event.preventDefault();
  });
  showGroup(0);
}
