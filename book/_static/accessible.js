/* What only the browser knows (the markup itself is repaired in _ext/accessible.py). Jupyter Book links this by itself. */

document.addEventListener("DOMContentLoaded", () => {
  // Whatever scrolls sideways, a wide formula on a phone for one, can be reached and scrolled by keyboard.
  const watch = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  document.querySelectorAll(".bd-article :is(div.math, .cell_output)").forEach((box) => watch.observe(box));

  // The theme's buttons: what is seen on them is part of their names.
  document.querySelectorAll(".search-button-field").forEach((button) => button.removeAttribute("aria-label"));
  document.querySelectorAll(".theme-switch").forEach((icon) => icon.removeAttribute("title"));

  // The side bar is a landmark.
  const sidebar = document.querySelector(".bd-sidebar-primary");
  sidebar?.setAttribute("role", "region");
  sidebar?.setAttribute("aria-label", "Contents");
});
