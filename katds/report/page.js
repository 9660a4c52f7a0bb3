"use strict";
// Draws the figures, and the rollouts of the chosen step. What a model wrote only ever becomes text (textContent), or text that is escaped
// for Plotly, which reads tags.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const figures = read("figures");
const rollouts = read("rollouts");
const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]]; // Plotly's own list has one that would send the figure away
const config = { displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: buttons };
const FLOOR = 1e-5; // nats: a logarithmic axis has no zero

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

const escaped = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function template() {
  const style = getComputedStyle(document.documentElement);
  const [text, quiet, grid, line, card] = ["text", "quiet", "grid", "line", "card"].map((name) => style.getPropertyValue("--" + name).trim());
  const axis = { gridcolor: grid, linecolor: line, zerolinecolor: line, tickcolor: line, automargin: true, title: { font: { size: 12 } } };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: quiet, size: 12, family: "system-ui, sans-serif" },
      xaxis: axis, yaxis: axis, hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text } }, legend: { font: { color: text } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: quiet },
    },
  };
}

const drawn = []; // what to draw anew when the reader's colours change: [element, data, layout]

function draw(target, data, layout) {
  drawn.push([target, data, layout]);
  const legend = layout.showlegend && target.clientWidth < 600 ? 18 * data.length : 0; // on a phone it has a line for each
  Plotly.newPlot(target, data, { ...layout, height: layout.height + legend, template: template() }, config);
}

function recolour() {
  for (const [target, , layout] of drawn) if (target.isConnected) Plotly.relayout(target, { template: template() });
}

function shade(kl) { // as the legend: nothing at 0.001 nats, full at 10
  const strength = Math.min(1, Math.max(0, (Math.log10(Math.max(kl ?? 0, FLOOR)) + 3) / 4));
  return strength > 0 ? `rgba(var(--kl), ${(0.8 * strength).toFixed(3)})` : "";
}

// Where the rule cut: tokens [0, kept) are learnt from but for those of the hole, [kept, cut_at) is what it saw, and the rest only audit
// rollouts have.
function zoneOf(sample, at) {
  if (sample.hole && at >= sample.hole[0] && at < sample.hole[1]) return "agreement";
  if (sample.cut_at === null || at < sample.kept) return "kept";
  return at < sample.cut_at ? "agreement" : "beyond";
}

function words(sample) {
  const block = element("div", "words");
  block.append(element("span", "prompt", sample.prompt + "\n"));
  if (sample.prefix) block.append(element("span", "prefix", sample.prefix));
  if (!sample.pieces) {
    block.append(element("span", "", sample.response));
    return block;
  }
  let zone = null;
  sample.pieces.forEach((piece, at) => {
    if (sample.cut_at !== null && at === sample.cut_at) block.append(element("span", "cut", "\u2502"));
    const name = zoneOf(sample, at);
    if (zone === null || zone.dataset.name !== name) {
      zone = element("span", "zone " + name);
      zone.dataset.name = name;
      block.append(zone);
    }
    const token = element("span", "token", piece);
    token.style.backgroundColor = shade(sample.kl[at]);
    token.title = sample.kl[at] === undefined || sample.kl[at] === null ? `token ${at + 1}` : `token ${at + 1}: ${sample.kl[at]} nats`;
    zone.append(token);
  });
  return block;
}

function chart(sample, target) {
  const above = (value) => (value === null ? null : Math.max(value, FLOOR));
  const places = sample.kl.map((_, i) => i + 1);
  const labels = sample.pieces ? places.map((i) => escaped(JSON.stringify(sample.pieces[i - 1] ?? ""))) : places.map(() => "");
  const data = [{
    x: places, y: sample.kl.map(above), customdata: labels, name: "KL(student || teacher) of the token", mode: "lines",
    line: { shape: "hvh", width: 1, color: "#2f7ebc" }, fill: "tozeroy", fillcolor: "rgba(47,126,188,0.35)",
    hovertemplate: "%{y:.3~g} nats, token %{x} %{customdata}<extra></extra>",
  }];
  if (sample.means.length) {
    data.push({
      x: sample.means.map((_, i) => i + sample.window), y: sample.means.map(above), name: `mean of ${sample.window} tokens`, mode: "lines",
      line: { color: "#8a63c9", width: 2 }, hovertemplate: "window %{y:.3~g} nats<extra></extra>",
    });
  }
  if (sample.threshold !== null) {
    data.push({
      x: [1, sample.tokens], y: [sample.threshold, sample.threshold], name: "threshold of the step", mode: "lines",
      line: { color: "#cf4a4a", width: 1.5, dash: "dash" }, hoverinfo: "skip",
    });
  }
  const shapes = [];
  const annotations = [];
  const shown = Math.min(sample.tokens, sample.limit);
  const band = (x0, x1, color) => ({ type: "rect", yref: "paper", y0: 0, y1: 1, x0: x0 + 0.5, x1: x1 + 0.5, fillcolor: color, line: { width: 0 }, layer: "below" });
  if (sample.hole) shapes.push(band(sample.hole[0], Math.min(sample.hole[1], shown), "rgba(224,123,26,0.22)"));
  if (sample.cut_at !== null) {
    shapes.push(band(sample.kept, sample.cut_at, "rgba(224,123,26,0.22)"), band(sample.cut_at, shown, "rgba(140,140,140,0.16)"));
    shapes.push({ type: "line", yref: "paper", y0: 0, y1: 1, x0: sample.cut_at + 0.5, x1: sample.cut_at + 0.5, line: { color: "#e07b1a", width: 2 } });
    annotations.push({ x: sample.cut_at + 0.5, y: 1, yref: "paper", yanchor: "top", xanchor: "left", text: "the rule's cut", showarrow: false });
  }
  draw(target, data, {
    height: 240, margin: { l: 56, r: 12, t: 8, b: 40 }, hovermode: "x", showlegend: true, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    xaxis: { title: { text: "response token" }, range: [0.5, shown + 0.5] }, yaxis: { title: { text: "nats" }, type: "log", range: [-5, 1.3], tickformat: "~g" },
    shapes, annotations,
  });
}

function ended(sample) {
  if (sample.reason === "eos") return "ended by the student";
  if (sample.reason === "length") return "at the maximum length";
  return `ended by ${sample.reason}`;
}

function article(sample) {
  const made = element("article");
  const badges = element("p", "badges");
  badges.append(element("b", "", `Rollout ${sample.id}`), element("span", "", `${sample.tokens} tokens, ${ended(sample)}`));
  if (sample.cut_at !== null) badges.append(element("span", "", `cut at ${sample.cut_at}, kept ${sample.kept}`));
  if (sample.hole) badges.append(element("span", "", `not learnt from: ${sample.hole[0] + 1} to ${sample.hole[1]}`));
  if (sample.audit) badges.append(element("span", "", "audit: never ended"));
  if (typeof sample.right === "boolean") badges.append(element("span", sample.right ? "right" : "wrong", sample.right ? "right answer" : "wrong answer"));
  made.append(badges, words(sample));
  if (!sample.pieces) made.append(element("p", "note", "Saved without its single tokens: the text cannot be shaded. Newer runs save them."));
  if (sample.tokens > sample.limit) made.append(element("p", "note", `The first ${sample.limit} tokens.`));
  return made;
}

function show(step) {
  const place = document.getElementById("samples");
  for (let i = drawn.length - 1; i >= 0; i--) {
    if (place.contains(drawn[i][0])) {
      Plotly.purge(drawn[i][0]);
      drawn.splice(i, 1);
    }
  }
  place.replaceChildren();
  const chosen = rollouts.filter((sample) => sample.step === step);
  for (const sample of chosen) {
    const made = article(sample);
    place.append(made);
    if (sample.kl.length) {
      const target = element("div", "chart");
      made.append(target);
      chart(sample, target);
    } else made.append(element("p", "note", "No KL was measured: neither the rule nor the audit group asked for it."));
  }
  document.getElementById("count").textContent = `${chosen.length} saved rollout${chosen.length === 1 ? "" : "s"}, audit group first`;
}

for (const [name, figure] of Object.entries(figures)) draw(document.getElementById("chart-" + name), figure.data, figure.layout);

if (rollouts.length) {
  const steps = [...new Set(rollouts.map((sample) => sample.step))];
  const select = document.getElementById("step");
  for (const step of steps) select.append(new Option(String(step), String(step)));
  // First what shows most: the last step in which the rule cut a rollout.
  const telling = rollouts.filter((sample) => sample.cut_at !== null || sample.hole).at(-1);
  select.value = String(telling ? telling.step : steps.at(-1));
  select.addEventListener("change", () => show(Number(select.value)));
  show(Number(select.value));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);

// A browser asks for the figures before it lays the page out for paper: they cannot know how wide that will be.
const PAPER = 660; // pixels between the margins of A4 and Letter
addEventListener("beforeprint", () => drawn.forEach(([target]) => Plotly.relayout(target, { width: PAPER })));
addEventListener("afterprint", () => drawn.forEach(([target]) => Plotly.relayout(target, { width: null, autosize: true })));
