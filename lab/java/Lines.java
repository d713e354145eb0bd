import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.net.ServerSocket;
import java.net.Socket;

/** One thread per connection; answers each line with its number on that connection. */
public class Lines {
    public static void main(String[] arguments) throws Exception {
        try (ServerSocket listening = new ServerSocket(7000, 1024)) {
            while (true) {
                Socket connection = listening.accept();
                connection.setTcpNoDelay(true);
                new Thread(() -> serve(connection)).start();
            }
        }
    }

    private static void serve(Socket connection) {
        try (connection) {
            BufferedReader lines =
                    new BufferedReader(new InputStreamReader(connection.getInputStream(), "US-ASCII"));
            OutputStream answers = connection.getOutputStream();
            long number = 0;
            for (String line; (line = lines.readLine()) != null; ) {
                number++;
                answers.write((number + " " + line + "\n").getBytes("US-ASCII"));
            }
        } catch (java.io.IOException failure) {
            System.err.println(failure);
        }
    }
}
