// A prototype bank that moves: drag the temperature, or a prototype, and watch the bank merge and split.
(() => {
  const palette = ["#2f86d0", "#dd6b20", "#12967a", "#c264a0", "#c99700", "#4aaed9", "#7d6bd6", "#8a8f98"];
  const centres = [[-0.62, 0.42], [-0.5, -0.5], [0.12, -0.12], [0.62, 0.5], [0.72, -0.42]];
  const coldest = 0.01, hottest = 1.5;

  function generator(seed) {
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }

  function gaussian(random) {
    return Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  }

  function drawTokens(count, random) {
    return Array.from({ length: count }, (_, i) => centres[i % centres.length].map((c) => c + 0.105 * gaussian(random)));
  }

  const mean = (points) => [0, 1].map((axis) => points.reduce((sum, p) => sum + p[axis], 0) / points.length);
  const distance = (a, b) => (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2;

  // T_c = 2 lambda_max(C): above it, every prototype at the mean is stable.
  function criticalTemperature(points) {
    const [mx, my] = mean(points);
    let xx = 0, xy = 0, yy = 0;
    for (const [x, y] of points) {
      xx += (x - mx) ** 2 / points.length;
      xy += ((x - mx) * (y - my)) / points.length;
      yy += (y - my) ** 2 / points.length;
    }
    return xx + yy + Math.hypot(xx - yy, 2 * xy);
  }

  function assign(token, prototypes, temperature) {
    const d = prototypes.map((p) => distance(token, p));
    const nearest = Math.min(...d);
    const weights = d.map((x) => Math.exp((nearest - x) / temperature));
    const total = weights.reduce((a, b) => a + b, 0);
    return weights.map((w) => w / total);
  }

  const softCentroid = (q, prototypes) => [0, 1].map((axis) => q.reduce((sum, w, k) => sum + w * prototypes[k][axis], 0));

  class Bank {
    constructor(tokenCount, prototypeCount) {
      this.random = generator(7);
      this.tokens = drawTokens(tokenCount, this.random);
      this.critical = criticalTemperature(this.tokens);
      this.restart(prototypeCount);
    }

    restart(count) {
      const [x, y] = mean(this.tokens);
      this.prototypes = Array.from({ length: count }, () => [x + 0.002 * gaussian(this.random), y + 0.002 * gaussian(this.random)]);
      this.assignAll(hottest);
    }

    assignAll(tau) {
      this.q = this.tokens.map((z) => assign(z, this.prototypes, tau * this.critical));
    }

    // One damped step towards the fixed point of the free energy; returns how far the bank moved.
    step(tau, held) {
      this.assignAll(tau);
      let moved = 0;
      this.prototypes.forEach((p, k) => {
        if (k === held) return;
        const mass = this.q.reduce((sum, q) => sum + q[k], 1e-12);
        for (const axis of [0, 1]) {
          const target = this.tokens.reduce((sum, z, n) => sum + this.q[n][k] * z[axis], 0) / mass;
          const change = 0.35 * (target - p[axis]) + 0.0004 * gaussian(this.random);
          p[axis] += change;
          moved = Math.max(moved, Math.abs(change));
        }
      });
      return moved;
    }

    terms() {
      let reconstruction = 0, variance = 0;
      this.tokens.forEach((z, n) => {
        const zbar = softCentroid(this.q[n], this.prototypes);
        reconstruction += distance(z, zbar) / this.tokens.length;
        this.q[n].forEach((w, k) => (variance += (w * distance(this.prototypes[k], zbar)) / this.tokens.length));
      });
      return { reconstruction, variance };
    }

    distinct() {
      const kept = [];
      for (const p of this.prototypes) if (kept.every((other) => distance(p, other) > 0.004)) kept.push(p);
      return kept.length;
    }
  }

  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const colours = palette.map(channels);

  function blend(q) {
    const sum = [0, 1, 2].map((c) => Math.round(q.reduce((total, w, k) => total + w * colours[k % colours.length][c], 0)));
    return `rgb(${sum})`;
  }

  const controls = `
    <div>
      <canvas class="bank-canvas" role="img" aria-label="Tokens in the plane, coloured by the prototypes they are assigned to"></canvas>
      <p class="bank-hint">Small: tokens. Large: prototypes. Drag the temperature, or a prototype.</p>
    </div>
    <div class="bank-panel">
      <label class="bank-label"><span>Reduced temperature <span class="bank-formula">τ = T / T<sub>c</sub></span></span>
        <output class="bank-tau"></output>
        <input class="bank-slider" type="range" min="0" max="1" step="0.001"></label>
      <p class="bank-verdict" aria-live="polite"></p>
      <div class="bank-bar" aria-hidden="true"><span class="bank-recon"></span><span class="bank-variance"></span></div>
      <p class="bank-terms"></p>
      <button class="bank-anneal" type="button">Cool from above T<sub>c</sub></button>
    </div>`;

  const toTau = (place) => coldest * (hottest / coldest) ** place;
  const toPlace = (tau) => Math.log(tau / coldest) / Math.log(hottest / coldest);

  class View {
    constructor(element) {
      element.innerHTML = controls;
      this.count = Number(element.dataset.prototypes || 8);
      this.bank = new Bank(Number(element.dataset.tokens || 260), this.count);
      this.part = (name) => element.querySelector(`.bank-${name}`);
      this.element = element;
      this.canvas = this.part("canvas");
      this.held = -1;
      this.connect();
      if (matchMedia("(prefers-reduced-motion: reduce)").matches) this.settleAt(0.12);
      else this.anneal();
    }

    connect() {
      this.part("slider").addEventListener("input", (event) => { this.cooling = false; this.setTau(toTau(Number(event.target.value))); });
      this.part("anneal").addEventListener("click", () => this.anneal());
      this.canvas.addEventListener("pointerdown", (event) => this.grab(event));
      this.canvas.addEventListener("pointermove", (event) => this.drag(event));
      for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => { this.held = -1; this.wake(); });
      new ResizeObserver(() => this.draw()).observe(this.canvas);
      new MutationObserver(() => this.draw()).observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
    }

    setTau(tau) {
      this.tau = tau;
      this.part("slider").value = toPlace(tau);
      this.wake();
    }

    settleAt(tau) {
      this.bank.restart(this.count);
      for (let place = 1; place > toPlace(tau); place -= 0.004) this.bank.step(toTau(place), -1);
      this.setTau(tau);
    }

    anneal() {
      this.bank.restart(this.count);
      this.cooling = true;
      this.setTau(hottest);
    }

    wake() {
      this.still = 0;
      if (!this.running) { this.running = true; requestAnimationFrame(() => this.frame()); }
    }

    frame() {
      if (this.cooling) this.cool();
      const moved = this.bank.step(this.tau, this.held);
      this.still = moved < 0.002 && !this.cooling && this.held < 0 ? this.still + 1 : 0;
      this.draw();
      this.running = this.still < 240;
      if (this.running) requestAnimationFrame(() => this.frame());
    }

    cool() {
      const place = toPlace(this.tau) - 0.0022;
      this.cooling = toTau(place) > 0.05;
      this.tau = toTau(place);
      this.part("slider").value = place;
    }

    scale() {
      const { clientWidth: width, clientHeight: height } = this.canvas;
      return { width, height, unit: Math.min(width / 2.15, height / 1.75) };
    }

    place([x, y]) {
      const { width, height, unit } = this.scale();
      return [width / 2 + x * unit, height / 2 - y * unit];
    }

    point(event) {
      const { width, height, unit } = this.scale();
      return [(event.offsetX - width / 2) / unit, (height / 2 - event.offsetY) / unit];
    }

    grab(event) {
      const at = this.point(event);
      const near = this.bank.prototypes.map((p) => distance(p, at));
      const k = near.indexOf(Math.min(...near));
      if (near[k] > 0.02) return;
      this.held = k;
      this.canvas.setPointerCapture(event.pointerId);
    }

    drag(event) {
      if (this.held < 0) return;
      this.bank.prototypes[this.held] = this.point(event);
      this.wake();
    }

    draw() {
      const { width, height } = this.scale(), ratio = devicePixelRatio || 1;
      if (!width) return;
      this.canvas.width = width * ratio;
      this.canvas.height = height * ratio;
      const ink = this.canvas.getContext("2d");
      ink.scale(ratio, ratio);
      this.drawTokens(ink);
      this.drawPrototypes(ink);
      this.report();
    }

    drawTokens(ink) {
      this.bank.tokens.forEach((z, n) => {
        const colour = blend(this.bank.q[n]), [x, y] = this.place(z), [cx, cy] = this.place(softCentroid(this.bank.q[n], this.bank.prototypes));
        ink.strokeStyle = ink.fillStyle = colour;
        ink.globalAlpha = 0.22;
        ink.beginPath(); ink.moveTo(x, y); ink.lineTo(cx, cy); ink.stroke();
        ink.globalAlpha = 0.9;
        ink.beginPath(); ink.arc(x, y, 2.6, 0, 7); ink.fill();
      });
    }

    drawPrototypes(ink) {
      const paper = getComputedStyle(this.element).getPropertyValue("--bank-paper");
      ink.globalAlpha = 1;
      this.bank.prototypes.forEach((p, k) => {
        const [x, y] = this.place(p);
        ink.beginPath(); ink.arc(x, y, 9, 0, 7);
        ink.fillStyle = palette[k % palette.length]; ink.fill();
        ink.lineWidth = 2.5; ink.strokeStyle = paper; ink.stroke();
        ink.lineWidth = 1;
      });
    }

    report() {
      const { reconstruction, variance } = this.bank.terms(), total = reconstruction + variance, count = this.bank.distinct();
      this.part("tau").textContent = this.tau.toFixed(this.tau < 0.1 ? 3 : 2);
      this.part("recon").style.width = `${(100 * reconstruction) / total}%`;
      this.part("variance").style.width = `${(100 * variance) / total}%`;
      this.part("terms").innerHTML =
        `<span class="bank-key-recon">L<sub>OLS</sub> ${reconstruction.toFixed(3)}</span> + <span class="bank-key-variance">V ${variance.toFixed(3)}</span> = L<sub>q</sub> ${total.toFixed(3)}`;
      const verdict = this.verdict(count);
      if (this.part("verdict").textContent !== verdict) this.part("verdict").textContent = verdict;
    }

    verdict(count) {
      if (this.tau >= 1) return "Above the critical temperature: every prototype falls to the mean.";
      if (count === 1) return "Just below the critical temperature: the mean is a saddle, and the bank begins to split.";
      return `Below the critical temperature: ${count} distinct prototypes out of ${this.count}.`;
    }
  }

  document.querySelectorAll(".prototype-bank").forEach((element) => new View(element));
})();
