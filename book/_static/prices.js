/* The budget that is moved by hand (companion/slider.py makes it, with every state of it). Jupyter Book links this by itself. */

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll(".prices").forEach((box) => {
    const states = JSON.parse(box.dataset.states);
    box.prepend(box.querySelector("template").content); // without this script there is nothing to move
    const input = box.querySelector("input");
    const output = box.querySelector("output");
    const cards = box.querySelectorAll("li");
    const mark = (right) => (right ? "✓" : "✗");

    const show = () => {
      const state = states[Math.round(input.value / input.step)];
      input.setAttribute("aria-valuetext", `δ = ${Number(input.value)}/255`);
      if (output.textContent !== state.says) output.textContent = state.says;
      cards.forEach((card, i) => {
        const kind = state.kind[i];
        const marks = card.querySelector(".marks");
        card.className = kind;
        marks.querySelector("b").textContent = mark(kind === "kept");
        marks.querySelector("i").textContent = mark(state.right[i]);
        marks.setAttribute("aria-label", `${kind}; W-PGD: ${state.right[i] ? "right" : "wrong"}`);
      });
    };

    input.addEventListener("input", show);
    show();
  });
});
