// Without a server, a script may read no other page: the results of a search are titles alone.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

// What is wider than the page scrolls in a box of its own, which the keyboard reaches too.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll(".bd-article img")) {
    const box = document.createElement("span");
    box.className = "picture";
    picture.replaceWith(box);
    box.append(picture);
  }
  const reach = (box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  };
  const watch = new ResizeObserver((changes) => changes.forEach(({ target }) => reach(target)));
  const boxes = ".picture, .pst-scrollable-table-container, .formula";
  document.querySelectorAll(boxes).forEach((box) => watch.observe(box));
  document.querySelectorAll(".picture img").forEach((picture) => {
    picture.addEventListener("load", () => reach(picture.parentNode));
  });
});
