// Every connection has a counter of its own: each line is answered by the next number.
import net from "node:net";
let open = 0;
net.createServer((socket) => {
  let count = 0;
  open += 1;
  socket.setNoDelay(true);
  socket.on("data", (data) => {
    for (const byte of data) if (byte === 10) socket.write(`${++count}\n`);
  });
  socket.on("close", () => { open -= 1; });
  socket.on("error", () => {});
}).listen(7000);
setInterval(() => {}, 50);
