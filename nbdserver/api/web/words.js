// Numbers, times and events as people read them. Pure: a value in, text out.

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

function scaled(value, step, units) {
  let place = 0;
  while (value >= step && place < units.length - 1) {
    value /= step;
    place += 1;
  }
  const digits = place === 0 || value >= 100 ? 0 : 1;
  return `${value.toFixed(digits)} ${units[place]}`.trim();
}

export function size(bytes) {
  return bytes === null || bytes === undefined ? "–" : scaled(bytes, 1024, SIZES);
}

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return "–";
  if (perSecond > 0 && perSecond < 10) return perSecond.toFixed(1);
  return scaled(perSecond, 1000, ["", "k", "M"]);
}

export function bandwidth(bytesPerSecond) {
  return bytesPerSecond === null || bytesPerSecond === undefined ? "–" : `${size(bytesPerSecond)}/s`;
}

export function latency(microseconds) {
  return microseconds ? scaled(microseconds, 1000, ["µs", "ms", "s"]) : "–";
}

export function duration(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const first = Math.max(0, parts.findIndex(([length]) => seconds >= length));
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  const [length, unit] = parts[first];
  const [next, nextUnit] = parts[first + 1];
  const rest = Math.floor((seconds % length) / next);
  return `${Math.floor(seconds / length)} ${unit}${rest ? ` ${rest} ${nextUnit}` : ""}`;
}

export function count(number, what) {
  return `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
}

export function clock(date) {
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
}

export function day(text) {
  return text ? text.slice(0, 10) : "";
}

const OWN = new Set(["sequence", "time", "kind", "times", "since", "family", "mba", "segment", "offset"]);

// {what: the kind in words, about: its fields, bad: whether somebody should look}
export function event(found) {
  const fields = Object.entries(found).filter(([name, value]) => !OWN.has(name) && value !== "");
  const about = fields.map(([name, value]) => `${name.replaceAll("_", " ").replace(/ (bytes|s)$/, "")} ${field(name, value)}`);
  const bad = /fail|error|damaged|not-|badly|alarm$|ended|full|raised|refused|lost|silent/.test(found.kind);
  const more = found.times > 1 ? ` (${found.times} times since ${clock(new Date(found.since))})` : "";
  return { what: found.kind.replaceAll("-", " "), about: about.join(", ") + more, bad };
}

function field(name, value) {
  if (typeof value === "number" && name.endsWith("bytes")) return size(value);
  if (typeof value === "number" && name.endsWith("_s")) return `${value} s`;
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
