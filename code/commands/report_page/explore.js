'use strict'
// What the report page does: values of curves under the pointer; the map, its thumbnails, toggles and neighbors.
const data = JSON.parse(document.getElementById('data').textContent)
const at = id => document.getElementById(id)
const tip = at('tip')

function showTip(nodes, x, y) {
  tip.replaceChildren(...nodes)
  tip.hidden = false
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`
  tip.style.top = `${y + 14 + tip.offsetHeight > innerHeight ? Math.max(4, y - tip.offsetHeight - 8) : y + 14}px`
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name)
  made.textContent = text
  return Object.assign(made, attributes)
}

// Curves

for (const chart of document.querySelectorAll('.chart')) {
  const { box, x: [first, last], lines } = data.charts[chart.dataset.chart]
  const epochs = [...new Set(lines.flatMap(([, line]) => line.map(([epoch]) => epoch)))].sort((a, b) => a - b)
  const rule = chart.appendChild(document.createElement('div'))
  rule.style.cssText = 'position: absolute; width: 1px; background: currentColor; pointer-events: none; display: none'
  let now = epochs.length - 1
  const show = index => {
    now = Math.max(0, Math.min(epochs.length - 1, index))
    const share = box[0] + (epochs[now] - first) / (last - first) * (box[2] - box[0])
    const place = chart.getBoundingClientRect()
    Object.assign(rule.style, {
      display: 'block', left: `${100 * share}%`, top: `${100 * box[1]}%`, height: `${100 * (box[3] - box[1])}%`
    })
    const values = lines.flatMap(([name, line]) => {
      const found = line.find(([epoch]) => epoch === epochs[now])
      return found ? [element('div', `${name ? name + ': ' : ''}${+found[1].toPrecision(5)}`)] : []
    })
    showTip([element('b', `epoch ${epochs[now]}`), ...values], place.left + share * place.width, place.top + 20)
  }
  const hide = () => { tip.hidden = true; rule.style.display = 'none' }
  const near = event => {
    const place = chart.getBoundingClientRect()
    const share = ((event.clientX - place.left) / place.width - box[0]) / (box[2] - box[0])
    const epoch = first + share * (last - first)
    const apart = epochs.map(each => Math.abs(each - epoch))
    show(apart.indexOf(Math.min(...apart)))
  }
  chart.addEventListener('pointermove', near)
  chart.addEventListener('pointerdown', near)
  chart.addEventListener('pointerleave', hide)
  chart.addEventListener('focusout', hide)
  chart.addEventListener('keydown', event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key]
    if (step) { event.preventDefault(); show(now + step) }
    if (event.key === 'Escape') hide()
  })
}

// Thumbnails

const sheets = data.sheets.map(source => Object.assign(new Image(), { src: source }))

function thumbnail(row) {
  const canvas = document.createElement('canvas'), { tile, across, per_sheet: per } = data
  canvas.width = canvas.height = tile
  const place = row % per
  canvas.getContext('2d').drawImage(
    sheets[Math.floor(row / per)], place % across * tile, Math.floor(place / across) * tile, tile, tile, 0, 0, tile, tile)
  return canvas
}

const classOf = row => data.classes[data.labels[row]] ?? 'no class'
const about = row => `${data.names[row].split('/').slice(-2).join('/')} (${classOf(row)}, ${data.splits[data.split[row]]})`

function imageButton(row, button = document.createElement('button')) {
  button.className = 'image'
  button.title = data.names[row]
  button.setAttribute('aria-label', about(row))
  button.replaceChildren(thumbnail(row))
  button.addEventListener('click', () => { choose(row); at('explorer').scrollIntoView({ block: 'nearest' }) })
  return button
}

// The map: what is drawn (points), and over it what is pointed at and chosen (marks)

const points = at('points'), marks = at('marks')
const view = { map: 0, scale: 1, x: 0.5, y: 0.5 } // which run's; x, y: the point of the map in the middle of the stage
const off = { classes: new Set(), splits: new Set() }
let hovered = null, chosen = null

const visible = row => !off.classes.has(data.labels[row]) && !off.splits.has(data.split[row])

const across = new Float32Array(data.labels.length), down = new Float32Array(data.labels.length) // px, since `place`
const onScreen = row => [across[row], down[row]]

function place() {
  const { clientWidth: w, clientHeight: h } = points, side = (Math.min(w, h) - 24) * view.scale
  data.maps[view.map].points.forEach(([x, y], row) => {
    across[row] = w / 2 + (x - view.x) * side
    down[row] = h / 2 + (y - view.y) * side
  })
}

function shape(path, label, x, y, r) {
  const kind = label < 0 ? 0 : Math.floor(label / data.colors.length) % 4
  if (kind === 0) { path.moveTo(x + r, y); path.arc(x, y, r, 0, 7) }
  else if (kind === 1) path.rect(x - r * .9, y - r * .9, r * 1.8, r * 1.8)
  else {
    const corners = kind === 2 ? [[0, -1.2], [1.1, .9], [-1.1, .9]] : [[0, -1.3], [1.1, 0], [0, 1.3], [-1.1, 0]]
    corners.forEach(([dx, dy], i) => path[i ? 'lineTo' : 'moveTo'](x + dx * r, y + dy * r))
    path.closePath()
  }
}

const ink = () => getComputedStyle(document.body).color
const color = label => label < 0 ? ink() : data.colors[label % data.colors.length]

function sized(canvas) {
  const ratio = devicePixelRatio || 1
  canvas.width = canvas.clientWidth * ratio
  canvas.height = canvas.clientHeight * ratio
  const pen = canvas.getContext('2d')
  pen.scale(ratio, ratio)
  return pen
}

function draw() {
  const pen = sized(points), paths = new Map()
  place()
  const small = data.labels.length > 4000 || points.clientWidth < 500
  const r = Math.min(7, (small ? 2.2 : 3.2) * Math.sqrt(view.scale))
  for (let row = 0; row < data.labels.length; row++) {
    if (!visible(row)) continue
    const label = data.labels[row]
    if (!paths.has(label)) paths.set(label, new Path2D())
    shape(paths.get(label), label, across[row], down[row], r)
  }
  pen.globalAlpha = .75
  for (const [label, path] of paths) { pen.fillStyle = color(label); pen.fill(path) }
  mark()
}

function mark() {
  const pen = sized(marks), ring = (row, r, width) => {
    const [x, y] = onScreen(row)
    pen.lineWidth = width
    pen.beginPath(); pen.arc(x, y, r, 0, 7); pen.stroke()
  }
  pen.strokeStyle = ink()
  if (chosen !== null) {
    ring(chosen, 8, 3)
    for (const row of data.maps[view.map].near[chosen]) {
      ring(row, 6, 1.5)
      pen.globalAlpha = .4
      pen.beginPath(); pen.moveTo(...onScreen(chosen)); pen.lineTo(...onScreen(row)); pen.stroke()
      pen.globalAlpha = 1
    }
  }
  if (hovered !== null) ring(hovered, 7, 2)
}

function nearestTo(x, y, most, fits = () => true) {
  let best = null, least = most * most
  for (let row = 0; row < data.labels.length; row++) {
    if (!visible(row)) continue
    const dx = across[row] - x, dy = down[row] - y, apart = dx * dx + dy * dy
    if (apart < least && fits(dx, dy)) { least = apart; best = row }
  }
  return best
}

function hover(row) {
  hovered = row
  mark()
  if (row === null) { tip.hidden = true; return }
  const [x, y] = onScreen(row), place = marks.getBoundingClientRect()
  showTip([thumbnail(row), element('div', about(row))], place.left + x, place.top + y)
}

function choose(row) {
  chosen = row
  mark()
  if (row === null) { at('chosen').replaceChildren(); return }
  const { near, cosine } = data.maps[view.map]
  const found = element('div', '', { className: 'found' })
  const whole = imageButton(row)
  found.append(whole, ...near[row].map((other, i) => {
    const pair = element('div', '', { className: 'pair' })
    const same = data.labels[other] < 0 ? '' : data.labels[other] === data.labels[row] ? '✓ ' : '✗ '
    pair.append(imageButton(other), element('small', `${same}${cosine[row][i].toFixed(3)}`))
    return pair
  }))
  at('chosen').replaceChildren(element('p', `${about(row)}, and what is nearest to it:`), found)
}

function zoom(factor, x = points.clientWidth / 2, y = points.clientHeight / 2) {
  const before = view.scale
  view.scale = factor ? Math.max(1, Math.min(60, before * factor)) : 1
  const side = Math.min(points.clientWidth, points.clientHeight) - 24
  const moved = 1 / before - 1 / view.scale
  if (view.scale === 1) view.x = view.y = 0.5
  else {
    view.x += (x - points.clientWidth / 2) / side * moved
    view.y += (y - points.clientHeight / 2) / side * moved
  }
  marks.style.touchAction = view.scale > 1 ? 'none' : 'pan-y'
  draw()
}

let drag = null
marks.addEventListener('pointerdown', event => { drag = { x: event.clientX, y: event.clientY, moved: false } })
marks.addEventListener('pointermove', event => {
  if (drag && event.buttons && view.scale > 1) {
    const dx = event.clientX - drag.x, dy = event.clientY - drag.y
    if (!drag.moved && Math.hypot(dx, dy) < 4) return
    const side = (Math.min(points.clientWidth, points.clientHeight) - 24) * view.scale
    view.x -= dx / side
    view.y -= dy / side
    drag = { x: event.clientX, y: event.clientY, moved: true }
    tip.hidden = true
    draw()
  } else if (event.pointerType !== 'touch') hover(nearestTo(event.offsetX, event.offsetY, 14))
})
marks.addEventListener('pointerup', event => {
  if (drag && !drag.moved) {
    const row = nearestTo(event.offsetX, event.offsetY, event.pointerType === 'touch' ? 24 : 14)
    hover(row)
    choose(row)
  }
  drag = null
})
marks.addEventListener('pointerleave', () => { drag = null; hover(null) })
marks.addEventListener('focusout', () => hover(null))
marks.addEventListener('wheel', event => { // a page that scrolls past stays one: only where the map is in use
  if (document.activeElement !== marks && !event.ctrlKey) return
  event.preventDefault()
  zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.offsetX, event.offsetY)
}, { passive: false })
marks.addEventListener('keydown', event => {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key]
  const row = hovered ?? chosen
  if (way) {
    const [x, y] = row === null ? [points.clientWidth / 2, points.clientHeight / 2] : onScreen(row)
    const ahead = (dx, dy) => dx * way[0] + dy * way[1] > Math.abs(dx * way[1]) + Math.abs(dy * way[0])
    const next = nearestTo(x, y, Infinity, row === null ? undefined : ahead)
    if (next !== null) hover(next)
  } else if (event.key === 'Enter' || event.key === ' ') { if (row !== null) choose(row) }
  else if (event.key === '+') zoom(1.5)
  else if (event.key === '-') zoom(1 / 1.5)
  else if (event.key === '0') zoom(0)
  else if (event.key === 'Escape') { hover(null); choose(null) }
  else return
  event.preventDefault()
})
for (const button of document.querySelectorAll('[data-zoom]')) {
  button.addEventListener('click', () => zoom(+button.dataset.zoom))
}

// Toggles

function toggle(text, hidden, key, label) {
  const line = document.createElement('label'), box = element('input', '', { type: 'checkbox', checked: true })
  box.addEventListener('change', () => {
    hidden[box.checked ? 'delete' : 'add'](key)
    draw()
  })
  line.append(box)
  if (label !== undefined) {
    const swatch = element('canvas', '', { width: 28, height: 28 }), pen = swatch.getContext('2d'), path = new Path2D()
    shape(path, label, 14, 14, 9)
    pen.fillStyle = color(label)
    pen.fill(path)
    line.append(swatch)
  }
  line.append(text)
  return line
}

const counts = new Map()
for (const label of data.labels) counts.set(label, (counts.get(label) ?? 0) + 1)
const labels = [...counts.keys()].sort((a, b) => a - b)
at('classes').append(...labels.map(label =>
  toggle(`${data.classes[label] ?? 'no class'} (${counts.get(label)})`, off.classes, label, label)))
if (data.splits.length > 1) at('splits').append(...data.splits.map((name, i) => toggle(name, off.splits, i)))
const setAll = checked => {
  for (const box of at('classes').querySelectorAll('label:not([hidden]) input')) box.checked = checked
  const boxes = [...at('classes').querySelectorAll('input')]
  for (const [i, label] of labels.entries()) off.classes[boxes[i].checked ? 'delete' : 'add'](label)
  draw()
}
at('all').addEventListener('click', () => setAll(true))
at('none').addEventListener('click', () => setAll(false))
at('filter').hidden = labels.length < 13
at('filter').addEventListener('input', () => {
  for (const line of at('classes').children) {
    line.hidden = !line.textContent.toLowerCase().includes(at('filter').value.toLowerCase())
  }
})
at('which')?.addEventListener('change', event => {
  view.map = +event.target.value
  zoom(0)
  choose(chosen)
})

new ResizeObserver(draw).observe(at('stage'))
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw)
Promise.all(sheets.map(sheet => sheet.decode())).then(() => {
  for (const button of document.querySelectorAll('.image[data-image]')) imageButton(+button.dataset.image, button)
  document.body.dataset.ready = 'yes'
})
