// Answers each line with its number on that connection.
'use strict';
const net = require('net');

net.createServer((connection) => {
  let number = 0;
  let rest = '';
  connection.setNoDelay(true);
  connection.setEncoding('latin1');
  connection.on('error', (failure) => console.error(failure));
  connection.on('data', (data) => {
    const lines = (rest + data).split('\n');
    rest = lines.pop();
    for (const line of lines) connection.write(`${++number} ${line}\n`);
  });
}).listen(7000, '0.0.0.0');
