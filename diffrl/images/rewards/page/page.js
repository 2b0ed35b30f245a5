// The page of the reward `human`: shows a group of images, sends which is the best, waits for the next.

const POLL_MS = 400;
const byId = (id) => document.getElementById(id);

let state = null; // what the server said last
let busy = false;
let ended = false;

async function ask(call, value = null) {
  let response;
  try {
    const body = JSON.stringify(value);
    response = await fetch(call, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  } catch {
    end();
    throw new Error("The run has ended or was stopped. Every vote is saved; `diffrl resume` goes on.");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

function end() {
  ended = true;
  for (const button of document.querySelectorAll("button")) button.disabled = true;
}

function complain(error) {
  byId("alert").textContent = error ? error.message : "";
  byId("alert").hidden = !error;
}

async function choose(best) {
  if (busy || ended || !state?.group || best >= state.group.images.length) return;
  busy = true;
  const cards = document.querySelectorAll(".image");
  if (best !== null) cards[best].classList.add("chosen");
  byId("status").textContent = best === null ? "Equally good." : `Image ${best + 1} is the best.`;
  try {
    show(await ask("choose", { images: state.group.images, best }));
    complain(null);
  } catch (error) {
    complain(error);
  } finally {
    busy = false;
  }
}

async function back() {
  if (busy || ended || !state?.group || !state.back) return;
  busy = true;
  byId("status").textContent = "Once more.";
  try {
    show(await ask("back", { images: state.group.images }));
    complain(null);
  } catch (error) {
    complain(error);
  } finally {
    busy = false;
  }
}

async function enough() {
  if (busy || ended || !state?.group) return;
  try {
    show(await ask("enough"));
  } catch (error) {
    complain(error);
  }
}

function show(next) {
  const before = JSON.stringify(state?.group?.images ?? null);
  state = next;
  const group = next.group;
  byId("round").textContent = `round ${next.round}` + (group ? left(next.left) : "");
  byId("votes").textContent = next.votes;
  const [right, of] = next.foretold;
  byId("foretold").textContent = of ? ` · of the last ${of} the model foretold ${right}` : "";
  byId("images").hidden = document.querySelector("h1").hidden = !group;
  byId("wait").hidden = Boolean(group);
  byId("equal").disabled = byId("enough").disabled = !group;
  byId("back").disabled = !next.back;
  byId("what").textContent = next.asks ? (next.left ? "One moment …" : "Training on your votes …") : "Thank you.";
  byId("why").textContent = next.asks
    ? "The next images come by themselves."
    : "The run goes on by what it has learned. You may close this page.";
  if (!group || JSON.stringify(group.images) === before) return;
  byId("prompt").textContent = group.prompt;
  byId("images").replaceChildren(...group.images.map(card));
}

// With a round's last vote its training begins, so that it stays.
const left = (n) => (n > 1 ? `, ${n} to go` : ", the last choice: it cannot be taken back");

function card(name, i) {
  const button = document.createElement("button");
  button.className = "image";
  button.setAttribute("aria-keyshortcuts", String(i + 1));
  const image = document.createElement("img");
  image.src = `${name}.png`;
  image.alt = `image ${i + 1}`;
  const key = document.createElement("kbd");
  key.textContent = i + 1;
  button.append(image, key);
  button.addEventListener("click", () => choose(i));
  return button;
}

async function poll() {
  if (ended) return;
  if (!busy) {
    try {
      show(await ask("state"));
      complain(null);
    } catch (error) {
      complain(error);
    }
  }
  if (!ended) setTimeout(poll, POLL_MS);
}

addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[1-9]$/.test(event.key)) choose(Number(event.key) - 1);
  else if (event.key === "ArrowUp" || event.key === "Backspace") back();
  else if (event.key === "ArrowDown" || (event.key === " " && event.target.tagName !== "BUTTON")) choose(null);
  else return;
  event.preventDefault();
});
byId("equal").addEventListener("click", () => choose(null));
byId("back").addEventListener("click", back);
byId("enough").addEventListener("click", enough);
poll();
