// The status page: asks the node for /v1/overview every POLL_MS and shows it.
//
// Rules: one request at a time, and few while the tab is hidden: its title still says how many things are wrong. Whoever
// looks sees how old what they see is: from the first request that fails on, the page says so above everything else.

import { bandwidth, clock, count, day, duration, event, latency, rate, size } from "./words.js";
import { bar, element, redraw, setText, sparkline, Table } from "./tables.js";

const POLL_MS = 2000;
const HIDDEN_MS = 30000;
const ANSWER_MS = 10000;
const ROWS = 50;
const NODES = 12; // shown at once: the volumes stand below them
const SLOTS = 60;
const STATES = {
  serving: "good", full: "now", failed: "now", unknown: "now", starting: "soon", idle: "soon", elsewhere: "good", up: "good", silent: "now", draining: "soon",
};
const TITLES = { now: "Now", soon: "Soon", note: "Note" };

const byId = (id) => document.getElementById(id);

const asked = { match: "", sort: "trouble", limit: ROWS };
let token = sessionStorage.getItem("token") ?? "";
let shown = null;
let answered = null; // when the last answer came
let failure = "";
let timer = 0;
let underWay = null;

// --- asking ---

async function ask() {
  clearTimeout(timer);
  underWay?.abort();
  const mine = (underWay = new AbortController());
  const late = setTimeout(() => mine.abort(new Error("no answer")), ANSWER_MS);
  try {
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    const answer = await fetch(`v1/overview?${new URLSearchParams(asked)}`, { headers, signal: mine.signal, cache: "no-store" });
    if (answer.status === 401) {
      wantToken();
      return;
    }
    const content = await answer.json();
    if (!answer.ok) throw new Error(`it answered ${answer.status}: ${content.error}`);
    if (mine === underWay) show(content);
  } catch (error) {
    if (mine !== underWay) return; // another one was asked instead
    failure = error instanceof TypeError || error.message === "no answer" ? "" : error.message;
    answered ??= new Date();
    lost(true);
  } finally {
    clearTimeout(late);
    if (mine === underWay) {
      underWay = null;
      if (byId("token-form").hidden) timer = setTimeout(ask, document.hidden ? HIDDEN_MS : POLL_MS);
    }
  }
}

function wantToken() {
  byId("token-wrong").hidden = !token;
  token = "";
  sessionStorage.removeItem("token");
  if (byId("token-form").hidden) {
    byId("token-form").hidden = false;
    byId("token").focus();
  }
  byId("content").hidden = true;
  lost(false);
  setText(byId("live"), "waiting for the token");
}

byId("token-form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  token = byId("token").value.trim();
  sessionStorage.setItem("token", token);
  byId("token-form").hidden = true;
  ask();
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && byId("token-form").hidden) ask();
});

// --- whether the node is there ---

let isLost = false;

function lost(now) {
  isLost = now;
  byId("lost").hidden = !now;
  document.body.classList.toggle("is-lost", now);
  const live = byId("live");
  live.className = now ? "now" : "good";
  tick();
}

function tick() {
  if (!isLost) {
    if (shown) setText(byId("live"), "live");
    return;
  }
  const silent = duration((new Date() - answered) / 1000);
  const host = shown?.host ?? location.host;
  setText(byId("live"), `no answer for ${silent}`);
  setText(byId("lost-what"), `No answer from ${host} for ${silent}`);
  setText(byId("lost-why"), failure || (shown ? `What you see below is from ${clock(answered)}. Asking again.` : "Asking again."));
  setText(byId("lost-remedy"), `To do: look whether the machine is up and can be reached (ping); on it, systemctl status nbdserver
    and nbdserver status. Hosts with volumes attached wait meanwhile.${shown?.cluster ? " Another node's page shows the cluster." : ""}`);
  document.title = `no answer · ${host} · nbdserver`;
}

setInterval(tick, 1000);

// --- showing ---

function show(content) {
  if (shown && shown.version !== content.version) location.reload(); // after an upgrade the page may be another one
  shown = content;
  answered = new Date();
  failure = "";
  byId("token-form").hidden = true;
  byId("content").hidden = false;
  lost(false);
  setText(byId("host"), content.cluster ? content.cluster.node : content.host);
  setText(byId("about"), `nbdserver ${content.version} · up ${duration(content.uptime_s)}`);
  document.body.classList.toggle("is-alone", !content.cluster);
  showFindings(content);
  showTiles(content);
  showCluster(content);
  showVolumes(content);
  showSpace(content);
  redraw(byId("work"), workLines(content), (lines) => lines.map((line) => element("li", {}, line.text, line.percent === null ? "" : bar(line.percent))));
  showNode(content);
  showEvents(content);
}

function showFindings({ findings, volumes, clients, states, host, cluster }) {
  const urgent = findings.filter((finding) => finding.urgency !== "note");
  const served = `${count(states.serving ?? 0, "volume")} served ${cluster ? "here " : ""}to ${count(clients, "client connection")}.`;
  const well = volumes.total ? `All is well: ${served}` : "All is well. There are no volumes yet: nbdserver volume create NAME --size 10G";
  const verdict = byId("verdict");
  setText(verdict, urgent.length ? `${count(urgent.length, "thing")} to look at. ${served}` : well);
  verdict.className = urgent.length ? urgent[0].urgency : "good";
  document.title = `${urgent.length ? `(${urgent.length}) ` : ""}${host} · nbdserver`;
  redraw(byId("findings"), findings, () => findings.map((finding) => element(
    "li", { class: `card ${finding.urgency}` },
    element("span", { class: "badge" }, TITLES[finding.urgency]),
    element("p", { class: "problem" }, `${finding.subject} ${finding.problem}`.trim()),
    finding.remedy ? element("p", { class: "remedy" }, element("b", {}, "To do: "), finding.remedy) : null,
  )));
}

function tile(title, value, below, drawing) {
  return element("div", { class: "tile" }, element("dt", {}, title), element("dd", {},
    element("b", {}, value), drawing, below ? element("span", {}, below) : null));
}

function showTiles({ states, clients, traffic, capacity, fills, cluster }) {
  setText(byId("tiles-title"), cluster ? `On ${cluster.node}, this node` : "");
  const own = Object.values(states).reduce((sum, number) => sum + number, 0);
  const troubled = Object.entries(states).filter(([state]) => state !== "serving").map(([state, number]) => `${number} ${state}`);
  const disk = fills.find((fill) => fill.subject === "file system");
  const tiles = [
    ["Volumes", own.toLocaleString("en"), troubled.join(", ") || (own ? "all are served" : "none yet"), null],
    ["Client connections", clients.toLocaleString("en"), "", null],
    ["Requests a second", rate(traffic.requests_per_s), `latency ${latency(traffic.latency_us)}`, [traffic.requests_history, rate]],
    ["Throughput", bandwidth(traffic.bytes_per_s), `read ${bandwidth(traffic.read_bytes_per_s)}, write ${bandwidth(traffic.write_bytes_per_s)}`,
      [traffic.bytes_history, bandwidth]],
    ["Disk", disk ? `${disk.percent.toFixed(0)} % used` : "–", `${size(capacity.free_bytes)} free of ${size(capacity.size_bytes)}`,
      disk ? disk.percent : null],
  ];
  redraw(byId("tiles"), tiles, () => tiles.map(([title, value, below, drawing]) => tile(title, value, below,
    Array.isArray(drawing) ? sparkline(drawing[0], SLOTS, drawing[1]) : drawing === null ? null : bar(drawing, mark(drawing)))));
}

function mark(percent) {
  return percent >= 90 ? "now" : percent >= 80 ? "soon" : "";
}

function state(name) {
  return [name, () => [element("span", { class: `state ${STATES[name] ?? ""}` }, name)]];
}

function plain(text) {
  return [text, () => [text]];
}

function activity(now, history, words) {
  return [[now, history], () => [element("span", {}, words(now)), history.length ? sparkline(history, SLOTS, words) : ""]];
}

// --- volumes ---

const volumes = new Table(byId("volume-rows"), [
  { title: "Volume", sort: "name", draw: (row) => [[row.name, row.description, row.base, row.read_only], () => [
    element("b", {}, row.name),
    element("small", {}, [row.description, row.base && `clone of ${row.base}`, row.read_only && "read-only"].filter(Boolean).join(" · "))]] },
  { title: "Node", sort: "node", ofCluster: true, draw: (row) => plain(row.node || "–") },
  { title: "State", sort: "trouble", draw: (row) => [[row.state, row.damaged_blocks, row.reason, row.replicas, row.in_sync], () => [
    ...state(row.state)[1](),
    element("small", {}, [row.reason, row.replicas && `${row.in_sync} of ${count(row.replicas, "replica")} in sync`, row.damaged_blocks && `${row.damaged_blocks} damaged`].filter(Boolean).join(" · "))]] },
  { title: "Size", sort: "size", number: true, draw: (row) => plain(size(row.size_bytes)) },
  { title: "Data", sort: "data", number: true, draw: (row) => [[row.live_bytes, row.shares_data, row.snapshots], () => [
    size(row.live_bytes),
    element("small", {}, [row.shares_data && "with its clones", row.snapshots && count(row.snapshots, "snapshot")].filter(Boolean).join(" · "))]] },
  { title: "Clients", sort: "clients", number: true, draw: (row) => plain(row.clients === null ? "–" : String(row.clients)) },
  { title: "Requests/s", sort: "requests", number: true, draw: (row) => activity(row.requests_per_s, row.requests_history, rate) },
  { title: "Throughput", sort: "bytes", number: true, draw: (row) => activity(row.bytes_per_s, row.bytes_history, bandwidth) },
  { title: "Latency", sort: "latency", number: true, draw: (row) => plain(latency(row.latency_us)) },
], (sort) => askFor({ sort }));

function askFor(change) {
  Object.assign(asked, change);
  ask();
}

function showVolumes({ volumes: { total, matching, rows }, cluster }) {
  volumes.showSort(asked.sort);
  volumes.update(rows);
  const some = rows.length < matching ? `the first ${rows.length} of ${matching.toLocaleString("en")}` : `all ${matching.toLocaleString("en")}`;
  setText(byId("volumes-more"), !total ? "There are none yet: nbdserver volume create NAME --size 10G"
    : !matching ? `None of ${count(total, "volume")} matches.`
      : `Showing ${some}${asked.match ? ` that match, of ${count(total, "volume")}` : ""}. Curves are of the last 5 minutes.`
        + (cluster ? " Of other nodes' volumes those are shown with their load that do the most." : ""));
  byId("volumes-all").hidden = rows.length >= matching || asked.limit >= 1000;
}

let typing = 0;
byId("volumes-match").addEventListener("input", (typed) => {
  clearTimeout(typing);
  typing = setTimeout(() => askFor({ match: typed.target.value.slice(0, 200), limit: ROWS }), 150);
});
byId("volumes-all").addEventListener("click", () => askFor({ limit: Math.min(1000, asked.limit * 4) }));

// --- the cluster ---

let mostNodes = NODES;

const nodes = new Table(byId("nodes"), [
  { title: "Node", draw: (row) => [[row.name, row.is_master, row.is_here, row.is_voter], () => [
    element("b", {}, row.name),
    element("small", {}, [row.is_master && "master", row.is_here && "this node", row.is_voter && "votes"].filter(Boolean).join(" · "))]] },
  { title: "State", draw: (row) => [[row.state, row.draining, row.silent_s], () => [
    ...state(row.state === "up" && row.draining ? "draining" : row.state)[1](),
    element("small", {}, row.silent_s === null ? "" : `for ${duration(row.silent_s)}`)]] },
  { title: "Address", draw: (row) => plain(row.address) },
  { title: "Site", draw: (row) => plain(row.across_wan ? `${row.site} (WAN)` : row.site) },
  { title: "Version", draw: (row) => plain(row.version) },
  { title: "Up", number: true, draw: (row) => plain(row.started && row.state === "up" ? duration((new Date() - new Date(row.started)) / 1000) : "–") },
  { title: "Volumes", number: true, draw: (row) => plain(row.volumes === null ? "–" : String(row.volumes)) },
  { title: "Requests/s", number: true, draw: (row) => plain(rate(row.requests_per_s)) },
  { title: "Throughput", number: true, draw: (row) => plain(row.read_bytes_per_s === null ? "–" : bandwidth(row.read_bytes_per_s + row.write_bytes_per_s)) },
  { title: "Latency", number: true, draw: (row) => plain(latency(row.latency_us)) },
  { title: "Disk used", number: true, draw: (row) => [row.fill_percent, () => row.fill_percent === null ? ["–"]
    : [`${row.fill_percent.toFixed(0)} %`, bar(row.fill_percent, mark(row.fill_percent))]] },
]);

function sum(nodes, field) {
  return nodes.reduce((all, node) => all + (node[field] ?? 0), 0);
}

function showCluster({ cluster, volumes: { total } }) {
  byId("cluster").hidden = !cluster;
  if (!cluster) return;
  const registry = cluster.registry;
  const words = byId("nodes-match").value.toLowerCase().split(/\s+/);
  const all = cluster.nodes.map((node) => ({ ...node, key: node.id ?? node.name, is_here: node.name === cluster.node }));
  const found = all.filter((node) => {
    const text = [node.name, node.site, node.address, node.state, node.version, node.fault_domain, node.is_master ? "master" : "",
      node.draining ? "draining" : ""].join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const place = (node) => (node.state !== "up" ? 0 : node.is_master ? 1 : 2);
  found.sort((one, other) => place(one) - place(other) || one.name.localeCompare(other.name, "en", { numeric: true }));
  nodes.update(found.slice(0, mostNodes));
  const up = all.filter((node) => node.state === "up").length;
  const old = cluster.is_active ? "" : "Old, for this node does not hear the master. ";
  setText(byId("cluster-facts"), `${old}Cluster ${cluster.name}: ${up} of ${count(all.length, "node")} up, master ${cluster.master || "none"}, `
    + `registry ${registry.kind} ${registry.is_connected ? "connected" : "not connected"}${registry.endpoint ? ` (${registry.endpoint})` : ""}. `
    + `Together ${count(total, "volume")}, ${count(sum(all, "clients"), "client connection")}, ${rate(sum(all, "requests_per_s"))} requests/s, `
    + `${bandwidth(sum(all, "read_bytes_per_s") + sum(all, "write_bytes_per_s"))}`);
  const rows = Math.min(found.length, mostNodes);
  setText(byId("nodes-more"), rows < all.length ? `Showing ${rows} of ${count(all.length, "node")}.` : "");
  byId("nodes-all").hidden = rows === found.length;
}

function showNodes(most) {
  mostNodes = most;
  if (shown) showCluster(shown);
}

byId("nodes-match").addEventListener("input", () => showNodes(NODES));
byId("nodes-all").addEventListener("click", () => showNodes(Infinity));

// --- the rest ---

const fills = new Table(byId("fills"), [
  { title: "Of", draw: (row) => plain(row.subject) },
  { title: "Used", number: true, draw: (row) => plain(size(row.used_bytes)) },
  { title: "Limit", number: true, draw: (row) => plain(size(row.size_bytes)) },
  { title: "Full", number: true, draw: (row) => [row.percent, () => [`${row.percent.toFixed(1)} %`, bar(row.percent, mark(row.percent))]] },
]);

function showSpace({ fills: all, capacity }) {
  fills.update(all.filter((fill) => fill.size_bytes).map((fill) => ({ ...fill, key: fill.subject })));
  const ratio = capacity.room_bytes ? capacity.provisioned_bytes / capacity.room_bytes : 0;
  setText(byId("promised"), `Volumes of ${size(capacity.provisioned_bytes)} are promised on ${size(capacity.room_bytes)} of room `
    + `(${ratio.toFixed(ratio < 10 ? 1 : 0)} times${capacity.overcommit ? `, at most ${capacity.overcommit}` : ""}); they take ${size(capacity.allocated_bytes)}.`);
}

function workLines({ scrubs, scrub_states: states, scrub_next: next, handover, resync, resync_count: behind }) {
  const lines = resync.map((replica) => {
    const known = replica.left_bytes !== null && replica.total_bytes;
    const left = replica.left_s === null ? "" : `, ${duration(replica.left_s)} left`;
    const progress = known ? `${size(replica.left_bytes)} to go at ${bandwidth(replica.bytes_per_s)}${left}` : replica.state;
    const why = replica.reason ? ` (waits: ${replica.reason})` : "";
    return {
      text: `Completing the replica of ${replica.volume} on ${replica.node}: ${progress}${why}`,
      percent: known ? (100 * (replica.total_bytes - replica.left_bytes)) / replica.total_bytes : null,
    };
  });
  if (behind > resync.length) lines.push({ text: `and ${count(behind - resync.length, "replica")} more, see nbdserver resync`, percent: null });
  lines.push(...scrubs.filter((scrub) => scrub.state === "running").map((scrub) => {
    const percent = scrub.total_bytes ? (100 * scrub.done_bytes) / scrub.total_bytes : 0;
    const left = scrub.left_s === null ? "" : `, ${duration(scrub.left_s)} left`;
    return { text: `Scrubbing ${scrub.volume}: ${size(scrub.done_bytes)} of ${size(scrub.total_bytes)} at ${bandwidth(scrub.rate_bytes_per_s)}${left}`, percent };
  }));
  const others = [[states.waiting, "waiting"], [states.failed, "failed"], [states.never, "never done"], [states.done, "done"], [states.stopped, "stopped"]]
    .filter(([number]) => number).map(([number, word]) => `${number} ${word}`);
  lines.push({ text: `Scrubs (all data is read to find what has rotted): ${others.join(", ") || "none"}${next ? `; the next on ${day(next)}` : ""}`, percent: null });
  if (handover && !handover.failure) {
    lines.push({ text: `Upgraded in place: ${count(handover.clients, "client")} waited ${handover.pause_s} s, ${handover.dropped} had to connect again`, percent: null });
  }
  return lines;
}

function showNode({ host, listen, data, pid, workers, tls, checksum, version }) {
  const rows = [
    ["Host", host],
    ["Clients connect to", listen.join(", ")],
    ["TLS", tls ? `${tls.mode}, certificate until ${day(tls.expires)}` : "none"],
    ["Data", data],
    ["Version", version],
    ["Processes", `${pid} (control), ${workers.map((worker) => worker.pid ?? "none").join(", ")} (data)`],
    ["Checksums", checksum],
  ];
  redraw(byId("node"), rows, () => rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

function showEvents({ events }) {
  redraw(byId("events"), [events[0]?.sequence, new Date().toDateString()], () => events.length ? events.map((found) => {
    const { what, about, bad } = event(found);
    return element("li", { class: bad ? "bad" : null },
      element("time", { datetime: found.time, title: found.time }, clock(new Date(found.time))),
      element("b", {}, what), element("span", {}, about));
  }) : [element("li", {}, "Nothing has happened yet.")]);
}

ask();
