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
