// Elements without markup strings: text never becomes HTML, so nothing a user wrote can run here.

const SVG = "http://www.w3.org/2000/svg";

/** `h("a.primary", {href: "#/"}, "Jobs")`. Properties named `on…` are listeners; null and false are left out. */
export function h(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  return fill(document.createElement(tag), classes, properties, children);
}

/** The same for SVG. */
export function s(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  return fill(document.createElementNS(SVG, tag), classes, properties, children);
}

/** Replace what is in `element`. */
export function put(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Write text only where it differs, so that selections and screen readers are left in peace. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
  return element;
}

/** Tell those who listen rather than look. */
export function announce(text) {
  say(document.getElementById("announcer"), text);
}

let counter = 0;

/** An id of this page's own, for labels and descriptions. */
export function fresh(prefix) {
  counter += 1;
  return `${prefix}-${counter}`;
}

function fill(element, classes, properties, children) {
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value" || key === "checked" || key === "selected") element[key] = value;
    else element.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}
