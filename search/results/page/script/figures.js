// Figures as people read them, and elements with text in them. A text of a study only ever becomes a text node.

/** A new element; attributes that are null are left out, functions are listeners, children are texts or elements. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") made.addEventListener(key, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const counted = (number) => number.toLocaleString("en-US");

/** Bytes with a unit of three digits or four: 1.55 MB. */
function sized(bytes) {
  if (Math.abs(bytes) < 1000) return `${counted(bytes)} B`;
  return Math.abs(bytes) >= 1e6 ? `${(bytes / 1e6).toFixed(2)} MB` : `${(bytes / 1e3).toFixed(1)} kB`;
}

const signed = (number, digits) => (number < 0 ? "" : "+") + number.toFixed(digits);

/** A figure with the half width of its 95 % interval, in the digits of the metric. */
function interval(figure, spread, metric) {
  const digits = 3 + metric.digits;
  if (figure === null) return "too large to show";
  return `${signed(figure, digits)} ± ${spread === null ? "?" : spread.toFixed(digits)}`;
}

/** What is black or white on a colour, whichever is told apart better (at least 4.5 : 1 on every colour). */
function inkOn(colour) {
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) / 255);
  const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) ? "#000000" : "#ffffff";
}

/** A colour of the style, by its name there. */
const toned = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
