// Makes the questions of a quiz answer. Without this script each shows its answer in a part that unfolds.
for (const form of document.querySelectorAll("form.quiz")) {
  const [button, reply, details] = ["button", ".quiz-reply", "details"].map((part) => form.querySelector(part));
  button.hidden = false;
  details.hidden = true;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const chosen = form.querySelector("input:checked");
    reply.replaceChildren();
    reply.className = "quiz-reply";
    if (!chosen) {
      reply.textContent = "Choose an answer first.";
      return;
    }
    const right = "right" in chosen.dataset;
    const verdict = document.createElement("strong");
    verdict.textContent = right ? "Right. " : "Not so. ";
    const why = chosen.closest(".quiz-choice").querySelector(".quiz-why");
    reply.append(verdict, ...[...why.childNodes].map((node) => node.cloneNode(true)));
    reply.classList.add(right ? "quiz-right" : "quiz-wrong");
  });
  form.addEventListener("change", () => reply.replaceChildren());
}
