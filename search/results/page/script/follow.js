// A page that a server gives follows the search.

/** Ask the server again every few seconds; nothing is drawn anew where nothing is new. */
function follow(page) {
  let known = document.documentElement.dataset.version;
  const ask = async () => {
    try {
      const answer = await fetch("/", { headers: { "If-None-Match": known } });
      if (answer.status === 200) {
        known = answer.headers.get("ETag");
        await page.renew(new DOMParser().parseFromString(await answer.text(), "text/html"));
      }
      byId("served").textContent = "";
    } catch {
      byId("served").textContent = "The server does not answer; this is what it said last.";
    }
    setTimeout(ask, 3000);
  };
  setTimeout(ask, 3000);
}
