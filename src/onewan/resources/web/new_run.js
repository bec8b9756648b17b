// Called by the page, which knows elements by their number: move to a field of the form.
window.revealField = (number) => {
  const field = getHtmlElement(number);
  field.scrollIntoView({ block: "center" });
  // A checkbox takes the focus itself, and other fields have what takes it.
  (field.tabIndex < 0 ? field.querySelector("input, textarea") : field)?.focus();
};

// CodeMirror makes the element that is typed into by itself, without a name for screen readers.
const nameText = () => {
  const content = document.querySelector(".ow-yaml .cm-content");
  if (!content) {
    setTimeout(nameText, 50);
    return;
  }
  content.setAttribute("aria-label", "Run file in YAML");
  content.tabIndex = 0;
};
nameText();
