// The page in a headless Chromium, for check.py: rows through the page's own worker, and the page itself as a visitor
// uses it. Reads what to do as JSON on standard input, prints JSON.

import { join } from "node:path";
import { chromium } from "playwright-core";

const input = async () => {
  let text = "";
  for await (const chunk of process.stdin) text += chunk;
  return JSON.parse(text);
};

/** Decisions, ids or times of every job: {what, name, asIs, rows, batch, thresholds, rounds}. */
async function rows(page, jobs) {
  await page.goto("client.mjs");
  return page.evaluate(async (jobs) => {
    const { Client } = await import("./client.mjs");
    const base = new URL("models/", location.href).href;
    const { models } = await (await fetch("models/index.json")).json();
    const client = new Client();
    const found = [];
    for (const { what, name, asIs = false, rows, ...how } of jobs) {
      const entry = models.find((model) => model.name === name);
      const key = asIs ? `${name} as it is` : name;
      await client.ask("open", { base, entry: { ...entry, name: key }, asIs });
      if (what !== "time") {
        found.push(await client.ask(what, { name: key, rows, ...how }));
        continue;
      }
      const only = (k) => Array.from({ length: entry.exits }, (_, exit) => (exit === k ? -1e6 : 1e6));
      const ways = { ...Object.fromEntries(entry.visited.map((k) => [`exit ${k}`, only(k)])), calibrated: null };
      const times = [];
      for (const row of rows) times.push(await client.ask("time", { name: key, row, ways, ...how }));
      found.push(times);
    }
    return found;
  }, jobs);
}

/** What the page shows after an answer and its times. */
async function shown(page) {
  await page.waitForSelector('#answer:not([hidden]) #times[data-done="true"]', { timeout: 120_000 });
  return page.evaluate(() => {
    const text = (id) => document.getElementById(id).textContent;
    return {
      label: text("label"),
      exit: Number(document.getElementById("answer").dataset.exit),
      probability: text("probability"),
      faster: text("faster"),
      exits: text("ms-exits"),
      full: text("ms-full"),
      wide: document.documentElement.scrollWidth - innerWidth,
      never: document.querySelectorAll("#road .never").length,
    };
  });
}

/** A question whose answer is waited for: what was shown before is gone first. */
async function after(page, act) {
  await page.evaluate(() => (document.getElementById("times").dataset.done = ""));
  await act();
  return shown(page);
}

/** The page, driven as by a visitor. `plan`: {text, image, sentence, picture, shots}. */
async function visit(browser, base, plan) {
  const context = await browser.newContext({ baseURL: base, viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  const [faults, away] = [[], []];
  page.on("pageerror", (error) => faults.push(error.message));
  page.on("console", (message) => message.type() === "error" && faults.push(message.text()));
  page.on("request", (request) => request.url().startsWith(base) || /^(data|blob):/.test(request.url()) || away.push(request.url()));
  const status = () => page.textContent("#status");
  const found = { faults, away };
  await page.goto(`#${plan.image}`);
  await shown(page);
  found.image = await after(page, () => page.click(`#images button:nth-child(${plan.picture + 1})`));
  await page.click(`[data-model="${plan.text}"]`);
  await page.waitForSelector("#text:not([hidden])", { timeout: 120_000 });
  found.text = await after(page, async () => {
    await page.fill("#sentence", plan.sentence);
    await page.press("#sentence", "Enter");
  });
  found.to_the_end = await after(page, () =>
    page.$eval("#slider", (slider) => {
      slider.value = slider.max;
      slider.dispatchEvent(new Event("input"));
    }),
  );
  found.reset = await after(page, () => page.click("#reset"));
  await page.fill("#sentence", "  ");
  await page.click("#text button[type=submit]");
  found.empty = await status();
  found.long = await after(page, async () => {
    await page.fill("#sentence", "long ".repeat(900));
    await page.click("#text button[type=submit]");
  });
  found.tokens = await page.textContent("#tokens");
  for (const scheme of ["light", "dark"]) {
    for (const [size, width, height] of [["wide", 1280, 900], ["phone", 390, 844]]) {
      await page.emulateMedia({ colorScheme: scheme });
      await page.setViewportSize({ width, height });
      for (const [kind, name] of [["text", plan.text], ["image", plan.image]]) {
        await page.click(`[data-model="${name}"]`);
        await page.waitForSelector(kind === "text" ? "#text:not([hidden])" : "#pictures:not([hidden])");
        const seen = await after(page, () =>
          kind === "text"
            ? page.fill("#sentence", plan.sentence).then(() => page.press("#sentence", "Enter"))
            : page.click(`#images button:nth-child(${plan.picture + 1})`),
        );
        found[`${kind} ${size} ${scheme}`] = seen.wide;
        await page.screenshot({ path: join(plan.shots, `${kind}-${size}-${scheme}.png`), fullPage: true });
      }
    }
  }
  await context.close();
  found.errors = await errors(browser, base, plan);
  return found;
}

/** What a visitor reads when something is missing. */
async function errors(browser, base, plan) {
  const read = {};
  const cases = {
    "no index": ["**/models/index.json", (route) => route.fulfill({ status: 404 })],
    "no model": ["**/*.onnx*", (route) => route.fulfill({ status: 404 })],
    "no connection": ["**/*.onnx*", (route) => route.abort()],
    "another file": ["**/*.onnx*", (route) => route.fulfill({ status: 200, body: "no model" })],
    "no pictures": ["**/*.samples.json", (route) => route.fulfill({ status: 404 })],
    "no engine": ["**/*.wasm", (route) => route.fulfill({ status: 404 })],
    "no worker": ["**/worker.mjs", (route) => route.fulfill({ status: 404 })],
  };
  for (const [name, [what, then]] of Object.entries(cases)) {
    const context = await browser.newContext({ baseURL: base, serviceWorkers: "block" });
    const page = await context.newPage();
    await context.route(what, then);
    await page.goto(`#${plan.image}`);
    await page.waitForSelector("#status.bad", { timeout: 60_000 }).catch(() => {});
    read[name] = (await page.textContent("#status.bad").catch(() => null)) ?? "nothing";
    await context.close();
  }
  return read;
}

async function main() {
  const [what, base, executablePath] = process.argv.slice(2);
  const given = await input();
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
  try {
    if (what === "rows") {
      const page = await (await browser.newContext({ baseURL: base })).newPage();
      page.setDefaultTimeout(0);
      console.log(JSON.stringify({ engine: `chromium ${browser.version()}`, found: await rows(page, given) }));
    } else {
      console.log(JSON.stringify(await visit(browser, base, given)));
    }
  } finally {
    await browser.close();
  }
}

main().catch((error) => {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
});
