// How turns look. Text comes from people, models and tools, so it is only ever set as text.

/** An element with properties and children; children that are strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const button = (text, onclick) => make("button", { type: "button", textContent: text, onclick });

/** Show a text, with what stands between fences as code. */
export function showText(element, text) {
  element.replaceChildren();
  text.split(/^[ \t]*```/m).forEach((part, index) => {
    if (index % 2 === 0) element.append(part);
    else element.append(make("pre", {}, make("code", { textContent: part.replace(/^.*\n?/, "") })));
  });
}

/** What a person said: it can be edited, and all that came after it is asked again. */
export class UserTurn {
  constructor(text, onEdit) {
    this.text = text;
    this.onEdit = onEdit;
    this.element = make("section", { className: "turn user", ariaLabel: "You" });
    this.show();
  }

  get messages() {
    return [{ role: "user", content: this.text }];
  }

  show() {
    const edit = button("Edit", () => this.edit());
    this.element.replaceChildren(
      make("div", { className: "text", textContent: this.text }),
      make("div", { className: "tools" }, edit),
    );
  }

  edit() {
    const field = make("textarea", { value: this.text, rows: 3, ariaLabel: "Your message" });
    const save = () => field.value.trim() && this.onEdit(this, field.value);
    const leave = () => {
      this.show();
      this.element.querySelector("button").focus();
    };
    field.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) save();
      else if (event.key === "Escape") leave();
      else return;
      event.preventDefault();
      event.stopPropagation();
    };
    const tools = make("div", { className: "tools" }, button("Ask again", save), button("Cancel", leave));
    this.element.replaceChildren(field, tools);
    field.focus();
  }
}

/** What the tools gave: the results that a person has filled in for calls. */
export class ResultsTurn {
  constructor(results) {
    this.messages = results.map(({ id, text }) => ({ role: "tool", tool_call_id: id, content: text }));
    const blocks = results.map(({ name, text }) =>
      make("div", { className: "call" }, make("h3", { textContent: `${name} gave` }),
        make("div", { className: "code", textContent: text })));
    this.element = make("section", { className: "turn results", ariaLabel: "Tool results" }, ...blocks);
  }
}

/** An answer while it comes and when it is there: thinking, text, calls, figures. */
export class AnswerTurn {
  constructor(onRetry) {
    this.onRetry = onRetry;
    this.reasoning = "";
    this.content = "";
    this.calls = [];
    this.thought = make("div", { className: "text" });
    this.summary = make("summary", { textContent: "Thinking…" });
    this.thinking = make("details", { className: "thinking", hidden: true }, this.summary, this.thought);
    this.body = make("div", { className: "text" });
    this.blocks = make("div", { className: "turn" });
    this.note = make("span", { className: "note" });
    this.tools = make("div", { className: "tools" }, this.note);
    this.element = make("section", { className: "turn answer", ariaLabel: "Answer", ariaBusy: "true" },
      this.thinking, this.body, this.blocks, this.tools);
  }

  /** The message for the next request; calls that were not completed are none. */
  get messages() {
    const message = { role: "assistant", content: this.content };
    if (!this.content && !this.reasoning && !this.complete.length) return [];
    if (this.reasoning) message.reasoning_content = this.reasoning;
    const calls = this.complete;
    if (calls.length) {
      message.tool_calls = calls.map(({ id, name, text }) =>
        ({ id, type: "function", function: { name, arguments: text } }));
    }
    return [message];
  }

  get complete() {
    return this.calls.filter(({ text }) => isObject(text));
  }

  get isThinking() {
    return Boolean(this.reasoning) && !this.content && !this.calls.length;
  }

  /** Take one delta of the stream. */
  add(delta) {
    if (delta.reasoning_content) {
      this.reasoning += delta.reasoning_content;
      this.thought.append(delta.reasoning_content);
      this.thinking.hidden = false;
    }
    if (delta.content) {
      this.content += delta.content;
      this.body.append(delta.content);
    }
    for (const call of delta.tool_calls ?? []) this.addCall(call);
    const state = this.isThinking ? "Thinking…" : "Thinking";
    this.summary.textContent = `${state} (${this.reasoning.length.toLocaleString("en")} characters)`;
  }

  addCall({ index, id, function: said }) {
    if (id) {
      const name = make("h3", { textContent: said.name });
      const shown = make("div", { className: "code" });
      const block = make("div", { className: "call" }, name, shown);
      this.calls[index] = { id, name: said.name, text: "", shown, block };
      this.blocks.append(block);
    }
    const call = this.calls[index];
    call.text += said.arguments ?? "";
    call.shown.append(said.arguments ?? "");
  }

  say(text) {
    this.note.textContent = text;
  }

  /** The answer is over; `error` says why, if it failed. */
  end(error) {
    this.element.ariaBusy = "false";
    showText(this.body, this.content);
    if (error) this.element.insertBefore(make("p", { className: "wrong", textContent: error }), this.tools);
    this.tools.append(button("Retry", () => this.onRetry(this)));
  }

  /** Let a person say what the calls gave. */
  askResults() {
    for (const call of this.complete) {
      call.field = make("textarea", { rows: 2 });
      call.block.append(make("label", {}, `What ${call.name} gives`, call.field));
    }
  }

  /** The results as they were filled in; the fields are gone then. */
  takeResults() {
    return this.complete.map(({ id, name, field }) => {
      field?.parentElement.remove();
      return { id, name, text: field?.value ?? "" };
    });
  }
}

function isObject(text) {
  try {
    return typeof JSON.parse(text) === "object";
  } catch {
    return false;
  }
}
