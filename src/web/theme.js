// Not a module, and loaded before anything is painted: the page must not flash in the wrong colours.
(() => {
  let theme = null;
  try {
    theme = localStorage.getItem('banter.theme');
  } catch {
    // Storage is forbidden: then it is the system's.
  }
  if (theme === 'light' || theme === 'dark') document.documentElement.dataset.theme = theme;
})();
