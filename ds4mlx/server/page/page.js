// The conversation: what was said, what is asked next, and the server's figures beside it.

import { ask, endThinking, health } from "./server.js";
import { AnswerTurn, ResultsTurn, UserTurn } from "./turns.js";

const the = (id) => document.getElementById(id);
const [message, settings, notice] = [the("message"), the("settings"), the("notice")];
let turns = [];
let running = null; // {abort, id, turn}

/** The request's fields, from the form; empty ones are left to the server. */
function options() {
  const form = new FormData(settings);
  const told = { reasoning_effort: form.get("reasoning_effort") };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    if (form.get(name) !== "") told[name] = Number(form.get(name));
  }
  if (form.get("tools").trim()) {
    told.tools = JSON.parse(form.get("tools"));
    told.tool_choice = form.get("tool_choice");
  }
  return told;
}

const key = () => settings.elements.key.value;

function history() {
  const system = settings.elements.system.value;
  const first = system.trim() ? [{ role: "system", content: system }] : [];
  return [...first, ...turns.flatMap((turn) => turn.messages)];
}

function put(turn) {
  turns.push(turn);
  the("turns").append(turn.element);
  turn.element.scrollIntoView({ block: "end" });
}

/** Forget a turn and all that came after it. */
function cutAt(turn) {
  const at = turns.indexOf(turn);
  for (const later of turns.splice(at)) later.element.remove();
}

function say(text) {
  running?.abort.abort();
  const last = turns.at(-1);
  if (last instanceof AnswerTurn && last.complete.length) put(new ResultsTurn(last.takeResults()));
  if (text.trim()) put(new UserTurn(text, edited));
  answer();
}

function edited(turn, text) {
  running?.abort.abort();
  cutAt(turn);
  say(text);
}

function retried(turn) {
  running?.abort.abort();
  cutAt(turn);
  answer();
}

async function answer() {
  let body;
  try {
    body = { ...options(), messages: history() };
  } catch (error) {
    the("options").open = true;
    tell(`The tools are no JSON: ${error.message}`);
    return;
  }
  const turn = new AnswerTurn(retried);
  const mine = { abort: new AbortController(), id: "", turn };
  put(turn);
  show(mine);
  watch();
  const error = await receive(mine, body);
  turn.end(error);
  if (running === mine) show(null);
  watch();
  if (turn !== turns.at(-1)) return;
  turn.askResults();
  follow(turn);
  const over = mine.abort.signal.aborted ? "The answer was stopped." : "The answer is complete.";
  tell(error ? "The answer failed." : over);
}

/** Take an answer as it comes; why it failed, or nothing. */
async function receive(mine, body) {
  const pace = new Pace();
  try {
    for await (const chunk of ask(body, key(), mine.abort.signal)) {
      mine.id = chunk.id ?? mine.id;
      const choice = chunk.choices?.[0];
      if (choice) {
        mine.turn.add(choice.delta);
        mine.finish = choice.finish_reason ? choice : mine.finish;
        mine.turn.say(pace.told());
        if (pace.pieces === 2) watch(); // the first piece of text: the figures have changed
      }
      if (chunk.usage) mine.turn.say(figures(chunk, mine.finish));
      if (running === mine) show(mine);
      follow(mine.turn);
    }
  } catch (error) {
    if (!mine.abort.signal.aborted) return error.message;
    mine.turn.say(`stopped; ${pace.told()}`);
  }
  return "";
}

/** How fast an answer comes, counted in the pieces that the server sends. */
class Pace {
  constructor() {
    this.pieces = 0;
    this.start = performance.now();
  }

  told() {
    if (this.pieces++ === 1) this.start = performance.now();
    const seconds = (performance.now() - this.start) / 1000;
    return this.pieces > 2 && seconds > 0 ? `${rate((this.pieces - 2) / seconds)} tokens/s` : "reading the prompt";
  }
}

const rate = (value) => (value < 10 ? value.toFixed(1) : Math.round(value).toString());

/** The line below an answer: what it took, and where its prompt's prefix came from. */
function figures({ usage, ds4mlx }, finish) {
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const from = cached && ds4mlx?.source ? ` from ${ds4mlx.source}` : "";
  const parts = [`${usage.completion_tokens} tokens`];
  if (ds4mlx?.generation_tps) parts.push(`${rate(ds4mlx.generation_tps)} tokens/s`);
  parts.push(`prompt ${usage.prompt_tokens} tokens, ${cached} of them reused${from}`);
  if (ds4mlx?.prompt_tps) parts.push(`${rate(ds4mlx.prompt_tps)} prompt tokens/s`);
  const why = { repetition: "ended because it repeated itself", context: "cut at the end of the context" };
  if (finish?.finish_reason === "length") parts.push(why[finish.stop_reason] ?? "cut at the most tokens");
  return parts.join(" · ");
}

function show(now) {
  running = now;
  the("stop").hidden = !now;
  the("answer-now").hidden = !now?.turn.isThinking;
  if (now) tell(now.turn.isThinking ? "Thinking…" : "Answering…");
}

/** Say how things stand; readers of the screen hear it once. */
function tell(text) {
  if (notice.textContent !== text) notice.textContent = text;
}

/** Keep the newest text in sight, unless the reader has scrolled away from it. */
function follow(turn) {
  const page = document.documentElement;
  const below = page.scrollHeight - page.scrollTop - page.clientHeight;
  if (turn === turns.at(-1) && below < 160) page.scrollTop = page.scrollHeight;
}

const stop = () => running?.abort.abort();

the("composer").onsubmit = (event) => {
  event.preventDefault();
  const last = turns.at(-1);
  const waits = last instanceof AnswerTurn && last.complete.length;
  if (!message.value.trim() && !waits) return;
  const text = message.value;
  message.value = "";
  say(text);
};

message.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  the("composer").requestSubmit();
};

document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
settings.onsubmit = (event) => event.preventDefault();
the("stop").onclick = stop;
the("answer-now").onclick = () => endThinking(running.id, key());
the("new").onclick = () => {
  stop();
  for (const turn of turns.splice(0)) turn.element.remove();
  tell("");
  message.focus();
};

function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = count < 1 ? 0 : Math.min(Math.floor(Math.log10(count) / 3), units.length - 1);
  return `${(count / 1000 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

let next = 0; // the timer of the next look at the figures

async function watch() {
  clearTimeout(next);
  const told = document.hidden ? null : await health(key());
  if (told?.model) {
    the("model").textContent = told.model;
    for (const name of ["running", "waiting"]) the(name).textContent = told[name];
    for (const name of ["state_bytes", "store_bytes"]) the(name).textContent = bytes(told[name]);
    the("tokens_per_second").textContent = rate(told.tokens_per_second);
  }
  clearTimeout(next);
  next = setTimeout(watch, running ? 500 : 2000);
}

watch();
