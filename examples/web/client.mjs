// The page's side of worker.mjs: `await worker.ask("answer", {name, rows})`.

export class Client {
  constructor() {
    this.waiting = new Map();
    this.number = 0;
    this.worker = new Worker(new URL("./worker.mjs", import.meta.url), { type: "module" });
    this.worker.addEventListener("message", ({ data }) => this.#heard(data));
    this.worker.addEventListener("error", (event) => {
      event.preventDefault();
      this.broken = "The engine could not be started here: a file of the page is missing, or the browser is too old.";
      for (const { reject } of this.waiting.values()) reject(new Error(this.broken));
      this.waiting.clear();
    });
  }

  ask(what, given, tell = () => {}) {
    if (this.broken) return Promise.reject(new Error(this.broken));
    const number = ++this.number;
    this.worker.postMessage({ number, what, given });
    return new Promise((resolve, reject) => this.waiting.set(number, { resolve, reject, tell }));
  }

  #heard({ number, value, error, progress }) {
    const asked = this.waiting.get(number);
    if (!asked) return;
    if (progress !== undefined) return asked.tell(progress);
    this.waiting.delete(number);
    if (error === undefined) asked.resolve(value);
    else asked.reject(new Error(error));
  }
}
