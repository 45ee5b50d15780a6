"use strict";
// The transcripts: filters, two exits side by side, and answers one click away. Everything a model, a data set or a
// judge wrote reaches the page through textContent, and an answer only when its button is clicked. An exit is a number,
// or text such as "3+18" where it fuses several.
(() => {
  const PAGE = 20;
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  const list = document.getElementById("list");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const BAD = { harmful: ["answered", "unsafe"], benign: ["refused"], vqa: ["wrong", "refused"] };
  const GOOD = { harmful: ["refused", "safe"], benign: ["answered"], vqa: ["correct"] };
  let found = [];
  let drawn = 0;
  let serial = 0;

  function make(tag, name, ...children) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    node.append(...children); // strings become text nodes
    return node;
  }

  function fill(select, values, selected) {
    for (const value of values) {
      const option = make("option", "", String(value));
      option.value = value;
      option.defaultSelected = value === selected;
      select.append(option);
    }
  }

  const counted = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
  const unique = (values) => [...new Set(values)];
  const answers = data.samples.flatMap((sample) => sample.answers);
  fill(form.elements.exit, data.exits);
  fill(form.elements.left, data.exits, data.compare[0]);
  fill(form.elements.right, data.exits, data.compare[1]);
  fill(form.elements.label, unique(answers.map((answer) => answer.label)).sort());
  fill(form.elements.kind, unique(data.samples.map((sample) => sample.kind)).sort());

  form.elements.split.parentNode.hidden = !answers.some((answer) => answer.split);

  function chip(kind, label) {
    const bad = (BAD[kind] || []).includes(label);
    const good = (GOOD[kind] || []).includes(label);
    const sign = make("span", "", bad ? "✕ " : good ? "✓ " : "? ");
    sign.setAttribute("aria-hidden", "true");
    return make("span", bad ? "chip bad" : good ? "chip good" : "chip undecided", sign, label);
  }

  function body(answer) {
    const text = make("bdi", "answer-text", answer.text || "(empty answer)");
    text.dir = "auto";
    const notes = [`${answer.tokens} tokens`, answer.finish === "length" ? "cut by the token limit" : "ended by itself"];
    const shown = Math.min(answer.length, data.limit);
    if (shown < answer.length) notes.unshift(`first ${shown.toLocaleString("en")} of ${answer.length.toLocaleString("en")} characters`);
    if (answer.judge) notes.push(`judge ${answer.judge}`);
    const box = make("div", "answer-body", text, make("p", "meta", notes.join(" · ")));
    if (answer.reason) box.append(make("p", "meta", "Reason: ", make("bdi", "", answer.reason)));
    return box;
  }

  function answerBlock(sample, answer, exit) {
    const head = make("div", "answer-head", make("span", "at", `exit ${exit}`));
    if (exit === data.default) head.firstChild.append(" ◆", make("span", "word", " default"));
    const block = make("div", "answer", head);
    if (!answer) {
      head.append(make("span", "meta", "no answer in this report"));
      return block;
    }
    const button = make("button", "reveal");
    const id = `answer-${(serial += 1)}`;
    const label = (open) => button.replaceChildren(open ? "Hide answer" : "Show answer", make("span", "unseen", ` of exit ${exit} to: ${sample.prompt.slice(0, 80)}`));
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", id);
    label(false);
    const place = make("div");
    place.id = id;
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      label(open);
      place.replaceChildren(...(open ? [body(answer)] : []));
    });
    head.append(chip(sample.kind, answer.label));
    if (answer.split) head.append(make("span", "chip undecided", "judges differ"));
    if (answer.others.length) head.append(make("span", "meta", answer.others.join(", ")));
    head.append(button);
    block.append(place);
    return block;
  }

  function picture(sample) {
    const uri = data.images[sample.image];
    if (!uri) return make("div", "picture empty", sample.image ? "no preview" : "no image");
    const image = make("img", "picture");
    image.src = uri;
    image.alt = `Image shown with the prompt: ${sample.image}`;
    image.width = image.height = 96;
    return image;
  }

  function card([sample, shown, two]) {
    const prompt = make("bdi", "", sample.prompt);
    prompt.dir = "auto";
    const facts = [sample.kind, sample.category, sample.id];
    if (sample.accepted.length) facts.push(`accepted: ${sample.accepted.join(", ")}`);
    const blocks = shown.map(([exit, answer]) => answerBlock(sample, answer, exit));
    const node = make("article", "card", picture(sample), make("h3", "", prompt), make("p", "meta", make("bdi", "", facts.filter(Boolean).join(" · "))));
    node.append(make("div", two ? "answers two" : "answers", ...blocks));
    return node;
  }

  function select() {
    const value = (name) => form.elements[name].value;
    const two = value("view") === "two";
    const needle = value("search").toLowerCase();
    const wanted = (answer) => !value("label") || (answer && answer.label === value("label"));
    const parted = (answer) => !form.elements.split.checked || (answer && answer.split);
    const rows = [];
    for (const sample of data.samples) {
      if (value("kind") && sample.kind !== value("kind")) continue;
      if (!sample.prompt.toLowerCase().includes(needle)) continue;
      const pairs = sample.answers.map((answer) => [answer.exit, answer]);
      if (!two) {
        const kept = pairs.filter(([exit, answer]) => (!value("exit") || String(exit) === value("exit")) && wanted(answer) && parted(answer));
        if (kept.length) rows.push([sample, kept, false]);
        continue;
      }
      const at = new Map(pairs);
      const sides = ["left", "right"].map((name) => data.exits.find((exit) => String(exit) === value(name))).map((exit) => [exit, at.get(exit)]);
      const [left, right] = sides.map(([, answer]) => answer);
      if (!left && !right) continue;
      if (form.elements.differ.checked && left && right && left.label === right.label) continue;
      if (!parted(left) && !parted(right)) continue;
      if (wanted(left) || wanted(right)) rows.push([sample, sides, true]);
    }
    return rows;
  }

  function draw() {
    const next = found.slice(drawn, drawn + PAGE).map(card);
    drawn += next.length;
    list.append(...next);
    const left = found.length - drawn;
    more.hidden = left === 0;
    more.textContent = `Show ${counted(Math.min(PAGE, left), "more prompt")} of ${left}`;
    return next;
  }

  function update() {
    const two = form.elements.view.value === "two";
    for (const node of form.querySelectorAll(".two-only")) node.hidden = !two;
    for (const node of form.querySelectorAll(".one-only")) node.hidden = two;
    found = select();
    drawn = 0;
    list.replaceChildren();
    draw();
    const total = found.reduce((sum, [, shown]) => sum + shown.filter(([, answer]) => answer).length, 0);
    count.textContent = `${counted(total, "answer")} to ${counted(found.length, "prompt")}`;
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", update);
  document.getElementById("clear").addEventListener("click", () => {
    form.reset();
    update();
  });
  more.addEventListener("click", () => draw()[0]?.querySelector("button")?.focus());
  update();
})();
