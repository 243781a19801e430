// Marks and colours that all charts are made of.

/** A mark of Vega: `from` names its data, or is null; channels are scales, fields and signals, or plain values. */
function mark(type, from, channels, name) {
  const refers = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const update = Object.fromEntries(
    Object.entries(channels).map(([key, value]) => [key, refers(value) ? value : { value }]),
  );
  // a screen reader hears what the page says of points, not their places
  return { type, name, aria: false, from: from ? { data: from } : undefined, encode: { update } };
}

const field = (scale, name) => ({ scale, field: name });
const signal = (expression) => ({ signal: expression });

/** Colours and type of every chart. */
function chartConfig() {
  const [ink, soft, grid, font] = [toned("ink"), toned("soft"), toned("grid"), "system-ui, sans-serif"];
  return {
    axis: {
      ...{ labelColor: ink, titleColor: ink, gridColor: grid, domainColor: soft, tickColor: soft },
      ...{ labelFont: font, titleFont: font, labelFontSize: 12, titleFontSize: 12.5, titleFontWeight: 500 },
      titlePadding: 10,
    },
    text: { font, fontSize: 12, fill: ink },
  };
}
