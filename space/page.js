// What gradio's own components lack: a list of images in one Tab stop, a part of an image to choose, files from anywhere.

function imageList(element, props, trigger, watch) {
  const box = () => element.querySelector("[role=listbox]");

  function activate(place) {
    props.active = place;
    const option = box().children[place];
    if (!option) return;
    // Within the list alone: `scrollIntoView` would move the page too.
    const above = option.offsetTop - box().scrollTop, below = above + option.offsetHeight - box().clientHeight;
    if (above < 0 || below > 0) box().scrollTop += above < 0 ? above - 8 : below + 8;
  }
  function choose(place) {
    if (!props.items[place]) return;
    props.value = props.items[place].key;
    activate(place);
    trigger("select");
  }
  element.addEventListener("click", (event) => choose([...box().children].indexOf(event.target.closest("[role=option]"))));
  element.addEventListener("keydown", (event) => {
    const tops = [...box().children].map((option) => option.offsetTop), last = tops.length - 1, now = props.active;
    const columns = tops.filter((top) => top === tops[0]).length;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -now, End: last - now };
    if (event.key === "Enter" || event.key === " ") choose(now);
    else if (!(event.key in steps)) return;
    else (props.follow ? choose : activate)(Math.min(Math.max(now + steps[event.key], 0), last));
    event.preventDefault();
  });
  const show = () => activate(Math.max(props.items.findIndex((item) => item.key === props.value), 0));
  watch(["value", "items"], show);
  show();
}

function imageMap(element, props) {
  const image = () => element.querySelector(".map");
  const within = (share) => Math.min(Math.max(share, 0), 1);
  element.addEventListener("click", (event) => {
    const shown = image().getBoundingClientRect();
    props.value = [within((event.clientX - shown.x) / shown.width), within((event.clientY - shown.y) / shown.height)];
  });
  element.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === "Escape") props.value = null;
    else if (steps) {
      const [x, y] = props.value ?? [0.5, 0.5], { cols, rows } = image().dataset;
      props.value = [within(x + steps[0] / cols), within(y + steps[1] / rows)];
    } else return;
    event.preventDefault();
  });
}

function tabList(element, props) {
  const tabs = [...element.querySelectorAll("[role=tab]")];
  const open = (tab) => {
    for (const other of tabs) other.tabIndex = other === tab ? 0 : -1;
    props.value = tab.textContent;
  };
  element.addEventListener("click", (event) => tabs.includes(event.target) && open(event.target));
  element.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: tabs.length - 1 }[event.key];
    if (!step) return;
    const tab = tabs[(tabs.indexOf(event.target) + step) % tabs.length];
    tab.focus();
    open(tab);
  });
  open(tabs[0]);
}

// One file that is too large would have gradio refuse all: it is sent empty instead, and told like other faults.
document.addEventListener("change", (event) => {
  const files = [...(event.target.files ?? [])];
  if (!files.some((file) => file.size > MAX_FILE_MB * 2 ** 20)) return;
  const sent = new DataTransfer();
  for (const file of files) sent.items.add(file.size > MAX_FILE_MB * 2 ** 20 ? new File([], file.name, file) : file);
  event.target.files = sent.files;
}, true);
for (const [name, source] of [["drop", "dataTransfer"], ["paste", "clipboardData"]])
  document.addEventListener(name, (event) => {
    const input = document.querySelector("input[type=file]"), files = event[source].files;
    if (!files.length) return;
    event.preventDefault();
    input.files = files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
document.addEventListener("dragover", (event) => event.preventDefault());
